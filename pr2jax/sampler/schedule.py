"""How requests go through the slots: what the host decides between device programs."""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np

from pr2jax.core import hosts
from pr2jax.models.config import num_moe_layers
from pr2jax.models.predictor import RouterFeatures
from pr2jax.replay.routes import route_dtype
from pr2jax.sampler import decode
from pr2jax.sampler.programs import Programs
from pr2jax.sampler.sampling import make_draw
from pr2jax.sampler.types import FINISH_LENGTH, FINISH_STOP, SamplingParams

# Requests that one fan-out or read-out call moves: few, since both copy whole rows.
MOVE_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Request:
    """One response to sample: its row in the rollout, and what its draws are keyed by."""

    row: int
    id: int
    prompt: int  # among the distinct prompts
    base_key: np.ndarray


class Run:
    """One call's requests on their way through the slots; holds what has come out so far."""

    def __init__(
        self,
        programs: Programs,
        params,
        sampling: SamplingParams,
        prompts: list[tuple[int, ...]],
        requests: list[Request],
        shift,
    ):
        """Plans the prefill of the distinct `prompts`, and makes room for the results."""
        self.programs, self.params, self.sampling, self.shift = programs, params, sampling, shift
        self.prompts, self.draw = prompts, make_draw(sampling)
        self._plan(requests)
        self.prefix: decode.Prefix | None = None
        self.prefix_batch = -1
        slots = programs.config.slots
        self.free = list(range(slots - 1, -1, -1))
        self.request: list[Request | None] = [None] * slots
        self.length = np.ones(slots, np.int64)
        self.live = np.zeros(slots, bool)
        self.stopped = np.zeros(slots, bool)
        self.cancel = np.zeros(slots, bool)  # ended by the host; the device learns it next chunk
        self.searched = np.zeros(slots, np.int64)  # length up to which no stop string appeared
        rows, cfg = len(requests), programs.cfg
        self.tokens = np.zeros((rows, programs.capacity), np.int32)
        self.logprobs = np.zeros((rows, programs.capacity), np.float32)
        self.prompt_lengths = np.asarray([len(prompts[r.prompt]) for r in requests], np.int32)
        self.lengths = self.prompt_lengths.copy()
        self.ends = np.full(rows, FINISH_LENGTH, np.int8)
        self.routes = None
        if num_moe_layers(cfg):
            filler = np.arange(cfg.moe.top_k, dtype=route_dtype(cfg.moe.num_experts))
            shape = (num_moe_layers(cfg), rows, programs.capacity, cfg.moe.top_k)
            self.routes = np.broadcast_to(filler, shape).copy()

    def _plan(self, requests: list[Request]) -> None:
        """Cuts prompts of one length bucket into prefill batches, and queues requests by batch."""
        by_bucket: dict[int, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            width = next(w for w in self.programs.prompt_lengths if w >= len(prompt))
            by_bucket.setdefault(width, []).append(i)
        size = self.programs.prefill_rows
        self.batches = [
            (width, members[i : i + size])
            for width, members in sorted(by_bucket.items())
            for i in range(0, len(members), size)
        ]
        place = {p: (b, i) for b, (_, m) in enumerate(self.batches) for i, p in enumerate(m)}
        self.place = [place[p] for p in range(len(self.prompts))]
        self.queue = deque(sorted(requests, key=lambda r: (self.place[r.prompt][0], r.row)))

    def run(
        self, state: decode.Slots | None, feature_tokens: int, tokenizer
    ) -> tuple[decode.Slots, RouterFeatures | None]:
        """Runs until every request is done and read out; returns the state for the next call."""
        self.state = self.programs.init_slots() if state is None else state
        places = min(feature_tokens, self.sampling.max_tokens)
        self.features = self.programs.init_features(len(self.lengths), places)
        while self.queue or self.live.any():
            while self.queue and self.free:
                self._admit()
            self._decode()
            if self.sampling.stop_strings:
                self._find_stop_strings(tokenizer.decode)
            if self.queue or not self.live.any():
                self._read_out()
        features = self.features
        if features is not None and self.sampling.stop_strings:
            # A stop string is seen only between chunks: what was recorded behind it goes.
            inside = features.positions < (self.lengths - 1)[:, None]
            features = features.replace(mask=features.mask & inside)
        return self.state, features

    def _admit(self) -> None:
        """Moves waiting requests of one prefill batch into free slots."""
        batch = self.place[self.queue[0].prompt][0]
        if batch != self.prefix_batch:
            width, members = self.batches[batch]
            prompts = [self.prompts[p] for p in members]
            self.prefix = None  # frees its memory before the next one takes as much
            self.prefix = self.programs.prefill(self.params, prompts, width, self.shift)
            self.prefix_batch = batch
        slots = len(self.request)
        moved = min(MOVE_ROWS, slots)
        entry = decode.Admission(
            slot=np.full(moved, slots, np.int32),
            source=np.zeros(moved, np.int32),
            base_key=np.zeros((moved, 2), np.uint32),
            request=np.zeros(moved, np.uint32),
            row=np.zeros(moved, np.int32),
        )
        for i in range(moved):
            if not (self.free and self.queue):
                break
            if self.place[self.queue[0].prompt][0] != batch:
                break
            request, slot = self.queue.popleft(), self.free.pop()
            entry.slot[i], entry.source[i] = slot, self.place[request.prompt][1]
            entry.base_key[i], entry.request[i] = request.base_key, request.id
            entry.row[i] = request.row
            self.request[slot] = request
            self.live[slot], self.cancel[slot] = True, False
            self.searched[slot] = self.prompt_lengths[request.row]
            self.length[slot] = self.prompt_lengths[request.row] + 1
        self.state = self.programs.fan_out(
            self.state, self.prefix, entry, self.sampling.max_tokens, self.draw
        )

    def _decode(self) -> None:
        """One chunk of steps for all slots."""
        slots = np.flatnonzero(self.live)
        limit = self.prompt_lengths[[self.request[s].row for s in slots]] + self.sampling.max_tokens
        longest = np.minimum(self.length[slots] + self.programs.config.chunk, limit).max()
        self.state, self.features, (length, active, stopped, _) = self.programs.decode(
            self.params,
            self.state,
            self.features,
            self.draw,
            self.cancel.copy(),
            self.shift,
            longest - 1,  # the token drawn last is not fed
        )
        self.length = np.where(self.cancel, self.length, length)
        self.stopped = self.cancel | stopped.astype(bool)
        self.live = active.astype(bool)

    def _find_stop_strings(self, decoded) -> None:
        """Ends rows in whose new tokens a stop string was completed, at the completing token."""
        tokens = np.asarray(hosts.to_host(self.state.tokens))
        for slot, request in enumerate(self.request):
            if request is None or self.searched[slot] == self.length[slot]:
                continue
            begin, end = int(self.prompt_lengths[request.row]), int(self.length[slot])
            response = tokens[slot, begin:end].tolist()

            def found(count, response=response):
                text = decoded(response[:count])
                return any(s in text for s in self.sampling.stop_strings)

            if found(len(response)):
                first = int(self.searched[slot]) - begin + 1
                count = next(c for c in range(first, len(response) + 1) if found(c))
                self.length[slot] = begin + count
                self.live[slot], self.stopped[slot], self.cancel[slot] = False, True, True
            self.searched[slot] = self.length[slot]

    def _read_out(self) -> None:
        """Brings the rows that are done to the host and frees their slots."""
        done = [s for s, r in enumerate(self.request) if r is not None and not self.live[s]]
        moved = min(MOVE_ROWS, len(self.request))
        for i in range(0, len(done), moved):
            part = done[i : i + moved]
            index = np.zeros(moved, np.int32)
            index[: len(part)] = part
            read = self.programs.read_out(self.state, index)
            for j, slot in enumerate(part):
                self._keep(slot, *read, j)
                self.request[slot] = None
        self.free.extend(reversed(done))

    def _keep(self, slot: int, tokens, logprobs, routes, j: int) -> None:
        """Stores the read-out's row `j`, which stood in `slot`."""
        row, end = self.request[slot].row, int(self.length[slot])
        self.lengths[row] = end
        self.ends[row] = FINISH_STOP if self.stopped[slot] else FINISH_LENGTH
        self.tokens[row, :end] = tokens[j, :end]
        self.logprobs[row, :end] = logprobs[j, :end]
        if routes is not None:
            self.routes[:, row, : end - 1] = routes[:, j, : end - 1]
