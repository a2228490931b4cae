"""What each command starts, asks and reports."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pr2jax.benchmark import table
from pr2jax.benchmark.compare import (
    Entry,
    against_best_peer,
    check_losses,
    ratio,
    round_seconds,
    row,
)
from pr2jax.benchmark.sides import (
    BenchmarkError,
    Side,
    checkpoint,
    find_peer_python,
    interleave,
    our_side,
    peer_side,
)
from pr2jax.benchmark.workload import Sizes, model_json, tokens

OPTIMIZER = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "clip_norm": 1.0}
RL_OPTIMIZER = {"learning_rate": 1e-5, "clip_norm": 1.0}
# [name, dims, products in a row]: those of the model at 8 x 512 tokens, and of a decode step.
SHAPES: list[list[Any]] = [
    ["square", [2048, 2048, 2048], 1],
    ["projection", [4096, 256, 256], 8],
    ["weight_gradient", [256, 4096, 256], 1],
    ["experts", [16, 1024, 256, 256], 1],
    ["decode", [8, 256, 256], 256],
    ["decode_experts", [16, 8, 256, 256], 64],
]
SMOKE_SHAPES: list[list[Any]] = [
    ["square", [16, 16, 16], 1],
    ["weight_gradient", [8, 16, 8], 1],
    ["experts", [2, 8, 4, 4], 3],
]


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line. `peer` and `peer_python` are None where they were not given."""

    command: str
    sizes: Sizes
    smoke: bool = False
    peer: str | None = None
    peer_python: str | None = None
    dtype: str = "auto"
    repeats: int = 5
    steps: int = 1
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    cache: Path = Path()
    compilation_cache: str = "off"
    profile: Path | None = None


class Bench:
    """The sides of one command, started one after another and closed together."""

    def __init__(self, options: Options, stack: contextlib.ExitStack):
        self.options, self._stack = options, stack
        self.entries: list[Entry] = []
        self.python = self.folder = None
        if options.peer:
            self.python = find_peer_python(options.peer_python)
            if options.command != "peaks":
                self.folder = checkpoint(self.python, model_json(options.smoke), options.cache)

    def _prepare(self, side: Side, message: dict[str, Any]) -> dict[str, Any]:
        """The side's answer once it is ready; says on stderr how long that took."""
        self._stack.enter_context(side)
        start = time.monotonic()
        ready = side.ask(message)
        seconds = time.monotonic() - start
        print(f"[pr2jax] {side.name}: ready after {seconds:.0f} s", file=sys.stderr, flush=True)
        return ready

    def shared(self) -> dict[str, Any]:
        """What both sides are told."""
        return {
            "checkpoint": str(self.folder or ""),
            "steps": self.options.steps,
            "repeats": self.options.repeats,
        }

    def ours(self, job: str, name: str = "pr2jax", dtype: str | None = None, **params) -> Entry:
        """Starts one of ours and adds it; "{dtype}" in its name becomes what it chose."""
        options = self.options
        message = self.shared() | {
            "smoke": options.smoke,
            "sizes": dataclasses.asdict(options.sizes),
            "dtype": dtype or options.dtype,
            "overrides": options.overrides,
            "compilation_cache": options.compilation_cache,
        }
        side = our_side(name.format(dtype=message["dtype"]), job)
        ready = self._prepare(side, message | params)
        side.name = name.format(dtype=ready["dtype"])
        self.entries.append(Entry(side, "ours", ready["dtype"], ready))
        return self.entries[-1]

    def peers(self, job: str, **params) -> None:
        """Starts the peer in each precision that is asked for; nothing without a peer."""
        if not self.python:
            return
        auto = self.options.dtype != "float32"
        for dtype in ("float32", "bfloat16") if auto else ("float32",):
            self.peer(f"{self.options.peer} {dtype}", job, dtype=dtype, **params)

    def peer(self, name: str, job: str, dtype: str = "", **params) -> None:
        """Starts the peer and adds it."""
        side = peer_side(name, self.python, job)
        ready = self._prepare(side, self.shared() | {"dtype": dtype} | params)
        self.entries.append(Entry(side, "peer", dtype, ready))

    def measure(self) -> list[list[dict[str, Any]]]:
        """The rounds; then, with --profile, one more of each of ours, traced."""
        answers = interleave([e.side for e in self.entries], self.options.repeats)
        if self.options.profile:
            for entry in self.entries:
                if entry.kind == "ours":
                    folder = self.options.profile / entry.side.name.replace(" ", "_")
                    entry.side.ask({"profile": str(folder)})
        return answers


@contextlib.contextmanager
def bench(options: Options) -> Iterator[Bench]:
    """The sides of a command; all are ended with it."""
    with contextlib.ExitStack() as stack:
        yield Bench(options, stack)


def report_rows(work: Bench, answers, units: float, ratios) -> dict[str, Any]:
    """rows, ratios and machine; a peer's operations are counted as ours are."""
    flops = next(e.ready["flops"] for e in work.entries if e.kind == "ours")
    rows = [
        row(e, a, units, e.ready.get("flops", flops))
        for e, a in zip(work.entries, answers, strict=True)
    ]
    return {"rows": rows, "ratios": ratios, "machine": work.entries[0].ready["versions"]}


def _ours_in_both(work: Bench, job: str, name: str = "pr2jax {dtype}", **params) -> None:
    """Ours as asked and, where that is not fp32, in fp32 as well."""
    if work.ours(job, name, **params).dtype != "float32":
        work.ours(job, name, dtype="float32", **params)


def train(options: Options) -> tuple[dict[str, Any], str]:
    """A full training step; the report and its text."""
    s = options.sizes
    ids = tokens((s.batch, s.length), model_json(options.smoke)["vocab_size"]).tolist()
    with bench(options) as work:
        _ours_in_both(work, "train", tokens=ids, **OPTIMIZER)
        work.peers("transformers_train", tokens=ids, **OPTIMIZER)
        check = check_losses(work.entries)
        answers = work.measure()
        ratios = against_best_peer(work.entries, answers)
        report = report_rows(work, answers, s.batch * s.length, ratios) | {"check": check}
    lines = [f"training step, {s.batch} x {s.length} tokens", table.compared(report, "tokens")]
    lines.append(table.peaks_line(report["rows"]))
    if check:
        apart = [abs(a - b) for a, b in zip(check["losses"], check["peer_losses"], strict=False)]
        told = ", ".join(f"{a:.2e}" for a in apart)
        lines.append(
            f"loss {check['losses'][0]:.4f}; {check['row']} - {check['peer']}, before the "
            f"first step and after it: {told}"
        )
    return report, "\n".join(lines)


def _prompts(options: Options, rows: int) -> list[list[int]]:
    vocab = model_json(options.smoke)["vocab_size"]
    return tokens((rows, options.sizes.prompt), vocab, seed=1).tolist()


def decode(options: Options) -> tuple[dict[str, Any], str]:
    """Sampling for a fixed number of new tokens; the report and its text."""
    s = options.sizes
    prompts = _prompts(options, s.rows)
    with bench(options) as work:
        _ours_in_both(work, "decode", prompts=prompts, mode="off")
        work.ours("decode", "pr2jax {dtype} pr2", prompts=prompts, mode="pr2")
        work.peers("transformers_decode", prompts=prompts, new=s.new)
        answers = work.measure()
        ratios = against_best_peer(work.entries, answers)
        report = report_rows(work, answers, s.rows * s.new, ratios)
    head = f"decode, {s.rows} rows, prompt {s.prompt}, {s.new} new tokens, temperature 1"
    logs = "pr2jax logs routes and log-probs throughout; pr2: predicted routes and features too"
    told = [head, table.compared(report, "new tokens"), table.peaks_line(report["rows"]), logs]
    return report, "\n".join(told)


def _texts(options: Options, count: int) -> list[str]:
    """Prompts as words of the checkpoint's tokenizer; or one letter for ours alone."""
    if not options.peer:
        return [chr(ord("a") + i % 26) for i in range(count)]
    return [" ".join(f"t{t}" for t in prompt) for prompt in _prompts(options, count)]


def grpo(options: Options) -> tuple[dict[str, Any], str]:
    """A GRPO step, one update a batch, in modes r3 and pr2; the report and its text."""
    s = options.sizes
    texts = _texts(options, 16 * s.prompts)
    with bench(options) as work:
        for mode in ("r3", "pr2"):
            work.ours(
                *("grpo", f"pr2jax {{dtype}} {mode}"),
                **{"texts": texts, "mode": mode, "mini_steps": 1, **RL_OPTIMIZER},
            )
        peer = {"prompts": s.prompts, "samples": s.samples, "completion": s.completion}
        work.peers("trl_grpo", texts=texts, **peer, **RL_OPTIMIZER)
        answers = work.measure()
        ratios = against_best_peer(work.entries, answers)
        report = report_rows(work, answers, 1, ratios)
    head = (
        f"GRPO step, {s.prompts} prompts x {s.samples} completions x {s.completion} tokens "
        f"after {s.prompt}, one update"
    )
    told = [head, table.compared(report, "steps"), table.peaks_line(report["rows"])]
    return report, "\n".join(told)


def pr2(options: Options) -> tuple[dict[str, Any], str]:
    """What PR2 costs over R3; the report and its text.

    Raises BenchmarkError where r3's program works for the predictor, pr2's does not, or the
    features take another number of bytes than the formula says.
    """
    s = options.sizes
    texts = _texts(options, 16 * s.prompts)
    prompts = _prompts(options, s.prompts)
    with bench(options) as work:
        for mode in ("r3", "pr2"):
            work.ours("mini_step", f"mini-step {mode}", prompts=prompts, mode=mode, **RL_OPTIMIZER)
        for mode in ("r3", "pr2"):
            work.ours(
                *("grpo", f"step of 4 {mode}"),
                **{"texts": texts, "mode": mode, "mini_steps": 4, **RL_OPTIMIZER},
            )
        answers = work.measure()
        seconds = [round_seconds(a) for a in answers]
        names = [e.side.name for e in work.entries]
        # So that above 1 is what pr2 costs: seconds(pr2) / seconds(r3).
        ratios = [ratio(names[i], names[i + 1], seconds[i], seconds[i + 1]) for i in (0, 2)]
        report = report_rows(work, answers, 1, ratios)
        ready = [e.ready for e in work.entries[:2]]
    check = {
        "features": ready[1]["features"],
        "predictor_work": {"r3": ready[0]["predictor_work"], "pr2": ready[1]["predictor_work"]},
    }
    check["cost"] = {k: r["median"] for k, r in zip(("mini_step", "step"), ratios, strict=True)}
    check["r3_free_of_predictor"] = not any(check["predictor_work"]["r3"].values())
    report["check"] = check
    _check_pr2(check)
    f = check["features"]
    costs = [f"{r['median']:.3f} ({r['min']:.3f} to {r['max']:.3f})" for r in ratios]
    text = [
        f"PR2 over R3: {s.prompts} x {s.samples} rows of {s.prompt} + {s.completion} tokens a "
        "mini-step, and steps of 4 mini-steps with their sampling",
        table.compared(report, "steps"),
        table.peaks_line(report["rows"]),
        f"step time over r3's: mini-steps 2 and later {costs[0]}, whole steps {costs[1]}",
        f"features: {f['bytes']:,} bytes held; L x rows x T_c x (2 D + 4 E) = "
        f"{f['predicted_bytes']:,} (T_c = {f['places']}); positions and masks {f['index_bytes']:,}",
        "r3's compiled program: "
        + ("no predictor work" if check["r3_free_of_predictor"] else "WORKS for the predictor"),
    ]
    return report, "\n".join(text)


def _check_pr2(check: dict[str, Any]) -> None:
    if not check["r3_free_of_predictor"]:
        raise BenchmarkError(f"r3's program works for the predictor: {check['predictor_work']}")
    if not all(check["predictor_work"]["pr2"].values()):
        raise BenchmarkError("pr2's program has no predictor work: the check would see nothing")
    features = check["features"]
    if features["bytes"] != features["predicted_bytes"]:
        raise BenchmarkError(
            f"features take {features['bytes']} bytes, predicted {features['predicted_bytes']}"
        )


def _dtypes(options: Options) -> list[str]:
    return ["float32", "bfloat16"] if options.dtype == "auto" else [options.dtype]


def divergence(options: Options) -> tuple[dict[str, Any], str]:
    """How often the sampler's programs part; the report and its text."""
    s = options.sizes
    with bench(options) as work:
        entry = work.ours("divergence", prompts=_prompts(options, s.rows), dtypes=_dtypes(options))
        found = entry.side.ask({})["rows"]
    lines = [
        [
            f"{r['dtype']}, {r['program']}",
            f"{r['diverged']} of {r['rows']}",
            f"{r['tokens']:,}",
            table.number(r["rate"]),
        ]
        for r in found
    ]
    head = f"first divergences, {s.rows} rows, prompt {s.prompt}, up to {s.new} new tokens"
    header = ["", "rows that part", "tokens in common", "first divergences a token"]
    report = {"programs": found, "machine": entry.ready["versions"]}
    return report, f"{head}\n{table.render(header, lines)}"


def peaks(options: Options) -> tuple[dict[str, Any], str]:
    """What the machine multiplies and copies; the report and its text."""
    shapes = SMOKE_SHAPES if options.smoke else SHAPES
    params = {
        "shapes": shapes,
        "dtypes": _dtypes(options),
        "copy_bytes": 2**16 if options.smoke else 2**28,
    }
    with bench(options) as work:
        work.ours("peaks", "jax", **params)
        if work.python:
            work.peer("torch", "torch_peaks", **params)
        answers = interleave([e.side for e in work.entries], 3)
        versions = work.entries[0].ready["versions"]
    names = [e.side.name for e in work.entries]
    best = [
        {key: max(answer["rates"][key] for answer in found) for key in found[0]["rates"]}
        for found in answers
    ]
    found = dict(zip(names, best, strict=True))
    rates = [
        {
            "library": name,
            "shape": shape,
            "dims": dims,
            "dtype": dtype,
            "flops_per_second": found[name][f"{shape}/{dtype}"],
        }
        for name in names
        for shape, dims, _ in shapes
        for dtype in params["dtypes"]
    ]
    memory = [{"library": n, "bytes_per_second": found[n]["memory"]} for n in names]
    columns = [(name, dtype) for name in names for dtype in params["dtypes"]]
    lines = [
        [
            f"{shape} {'x'.join(map(str, dims))}",
            *(table.number(found[n][f"{shape}/{d}"] / 1e9) for n, d in columns),
        ]
        for shape, dims, _ in shapes
    ]
    header = ["GFLOP/s", *(f"{n} {d}" for n, d in columns)]
    told = ", ".join(f"{m['library']} {m['bytes_per_second'] / 1e9:.1f} GB/s" for m in memory)
    text = f"{table.render(header, lines)}\nmemory, read + write in place: {told}"
    return {"rates": rates, "memory": memory, "machine": versions}, text
