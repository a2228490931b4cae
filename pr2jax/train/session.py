"""What every mode sets up once: devices, precision, tokenizer, parameters, sampler, verifiers."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from pr2jax.core import hosts, rng
from pr2jax.core.checkpoint import restore_params
from pr2jax.core.config import ConfigError
from pr2jax.core.device import resolve_dtype, versions
from pr2jax.core.metrics import write_json
from pr2jax.core.params import (
    Tree,
    abstract_params,
    count_params,
    init_params,
    map_with_path,
)
from pr2jax.core.sharding import BATCH_AXES, batch_shards, make_mesh, param_shardings
from pr2jax.core.store import as_path
from pr2jax.data.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    build_tokenizer,
    encode_prompt,
    save_tokenizer,
)
from pr2jax.models.config import ModelConfig, num_moe_layers
from pr2jax.models.flops import active_params
from pr2jax.models.importers import hf
from pr2jax.models.transformer import param_specs
from pr2jax.models.upcycling import UpcycleConfig, upcycle
from pr2jax.sampler.engine import Sampler
from pr2jax.sampler.types import SamplingParams
from pr2jax.tasks.base import Problem
from pr2jax.tasks.judge import EndpointJudge, Judge, JudgeConfig, JudgeError, PromptJudge
from pr2jax.tasks.pool import VerifierPool
from pr2jax.tasks.registry import needs
from pr2jax.tasks.sandbox import Sandbox, SandboxError
from pr2jax.train.config import Config, with_vocab_size
from pr2jax.train.init_from import (
    TOKENIZER,
    checkpoint_folder,
    is_imported,
    like_checkpoint,
    model_of,
    saved_config,
)
from pr2jax.train.study_config import GenerateConfig

log = logging.getLogger("pr2jax")

_WALL = "wall.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
    """A run's fixed surroundings. `mesh` is None on one device."""

    cfg: Config
    workdir: epath.Path
    tokenizer: Tokenizer
    mesh: Mesh | None
    dtype: Any
    specs: Tree
    shardings: Tree | None
    started: float
    before: float

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The sampler, one for the whole run: its cache is allocated once."""
        return Sampler(
            self.cfg.model,
            self.cfg.sampler,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            mesh=self.mesh,
        )

    @functools.cached_property
    def pool(self) -> VerifierPool:
        """The verifiers' worker processes, started on first use."""
        v = self.cfg.verifier
        return VerifierPool(
            workers=v.workers,
            timeout_s=v.timeout_s,
            memory_mb=v.memory_mb,
            sandbox=v.sandbox,
            judge=self.judge,
        )

    def check_verifiers(self, problems: Sequence[Problem]) -> None:
        """Sees to it that the problems can be scored, before anything is sampled.

        Raises ConfigError naming a problem that needs a judge where none is configured, or the
        reason why programs cannot be isolated on this machine.
        """
        if hosts.several() and self.cfg.verifier.judge.kind == "sampler":
            raise ConfigError(
                "verifier.judge.kind: 'sampler' judges in a run of one process; serve the judge's "
                "model and use 'endpoint'"
            )
        needed = {needs(problem): problem for problem in problems}
        if "judge" in needed and self.judge is None:
            problem = needed["judge"]
            raise ConfigError(
                f"verifier.judge.kind: problem {problem.id} ({problem.data_source}) may need a "
                "model judge, and it is 'none'"
            )
        if "sandbox" in needed and not self.verifies:
            with hosts.together("trying the sandbox"):
                try:
                    with Sandbox(self.cfg.verifier.sandbox) as sandbox:
                        log.info("sandbox: programs run in tier %r", sandbox.tier)
                except SandboxError as error:
                    raise ConfigError(f"verifier.sandbox.isolation: {error}") from None

    @functools.cached_property
    def judge(self) -> Judge | None:
        """The model judge, if one is configured."""
        judge = self.cfg.verifier.judge
        if judge.kind == "endpoint":
            return EndpointJudge(judge)
        return PromptJudge(judge, self._ask_own) if judge.kind == "sampler" else None

    def _ask_own(self, prompts: list[str]) -> list[str]:
        """Replies of the judge's own model, sampled here."""
        v, session = self.cfg.verifier, self._judge_session
        greedy = v.judge.temperature == 0
        sampling = SamplingParams(
            max_tokens=v.judge.max_tokens,
            greedy=greedy,
            temperature=1.0 if greedy else v.judge.temperature,
        )
        ids = []
        for prompt in prompts:
            chat = ({"role": "user", "content": prompt},)
            ids.append(encode_prompt(session.tokenizer, chat if session.tokenizer.chat else prompt))
            if len(ids[-1]) > v.judge_sampler.max_prompt:
                raise JudgeError(
                    f"verifier.judge_sampler.max_prompt: {v.judge_sampler.max_prompt} tokens, but "
                    f"a judge's prompt has {len(ids[-1])}; lower verifier.judge.max_chars"
                )
        replies = session.sampler.generate(ids, sampling, params=session.judging_params)
        return [reply[0].text for reply in replies]

    @functools.cached_property
    def _judge_session(self) -> Session:
        v = self.cfg.verifier
        quiet = dataclasses.replace(v, judge=JudgeConfig(), judge_from="")
        cfg = dataclasses.replace(
            self.cfg,
            mode="generate",
            generate=GenerateConfig(
                prompts="the judge's", sampling=SamplingParams(max_tokens=v.judge.max_tokens)
            ),
            init_from=v.judge_from,
            upcycle=UpcycleConfig(),
            tokenizer=TokenizerConfig(),
            sampler=v.judge_sampler,
            verifier=quiet,
        )
        log.info("judge: %s", v.judge_from)
        return open_session(cfg, self.workdir / "judge")

    @functools.cached_property
    def judging_params(self) -> Tree:
        """Parameters of a judge's session: loaded once, never trained."""
        return self.initial_params()

    @property
    def samples(self) -> bool:
        """Whether the sampler was used."""
        return "sampler" in self.__dict__

    @property
    def verifies(self) -> bool:
        """Whether the verifiers were used."""
        return "pool" in self.__dict__

    @functools.cached_property
    def config_json(self) -> dict[str, Any]:
        """The resolved configuration as JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self.cfg)))

    def key(self, *names: str | int) -> jax.Array:
        """A random key of this run, by name."""
        return rng.named(rng.root(self.cfg.seed), *names)

    def initial_params(self) -> Tree:
        """From `init_from` where given (upcycled if told so), else random.

        Committed to their devices, as restored ones are: other programs would be compiled for
        arrays that are not, and a run would compile all of them again when it first resumes.
        """
        return jax.tree.map(lambda x: jax.device_put(x, x.sharding), self._initial_params())

    def _initial_params(self) -> Tree:
        if not self.cfg.init_from:
            return init_params(self.specs, self.key("params"), self.shardings)
        log.info("parameters from %s", self.cfg.init_from)
        source = hf.resolve(self.cfg.init_from)
        if not self.cfg.upcycle.experts:
            return self._load(source, self.cfg.model)
        dense, moe = model_of(source), self.cfg.model.moe
        make = functools.partial(
            upcycle, cfg=dense, options=self.cfg.upcycle, predictor=moe.predictor
        )
        start = time.monotonic()
        params = jax.jit(make, out_shardings=self.shardings)(
            self._load(source, dense), key=self.key("upcycle")
        )
        shape = f"{moe.num_experts} experts of {moe.expert_dim} units, {moe.top_k} a token"
        log.info("upcycled to %s in %.1f s", shape, time.monotonic() - start)
        return params

    def _load(self, source: str, model: ModelConfig) -> Tree:
        """The parameters in the folder `source`, as those of `model`.

        A predictor that a run had not starts at zero, one too many is left.
        """
        specs = self.specs if model == self.cfg.model else param_specs(model)
        abstract = self._abstract(specs)
        if is_imported(source):
            return hf.load_params(source, abstract)[1]
        folder = checkpoint_folder(source)
        saved, _ = saved_config(folder)
        predicts = [m.moe is not None and m.moe.predictor for m in (saved, model)]
        if predicts[0] == predicts[1]:
            return restore_params(folder, abstract)
        found = restore_params(folder, self._abstract(param_specs(saved)))
        flat = traverse_util.flatten_dict(found, sep="/")
        own = init_params(self.specs, self.key("params"), self.shardings)
        return map_with_path(lambda path, leaf: flat.get(path, leaf), own)

    def _abstract(self, specs: Tree) -> Tree:
        shardings = None if self.mesh is None else param_shardings(specs, self.mesh)
        return abstract_params(specs, shardings)

    def encode(self, problem: Problem) -> list[int]:
        """Token ids of a problem's prompt. Raises ConfigError naming the problem."""
        try:
            ids = encode_prompt(self.tokenizer, problem.input)
        except ValueError as error:
            raise ConfigError(f"tokenizer: problem {problem.id}: {error}") from None
        if len(ids) > self.cfg.sampler.max_prompt:
            raise ConfigError(
                f"sampler.max_prompt: {self.cfg.sampler.max_prompt} tokens, but the prompt of "
                f"problem {problem.id} has {len(ids)}"
            )
        return ids

    def wall_seconds(self) -> float:
        """Wall time of this run so far, earlier processes (unless killed) included."""
        return self.before + time.monotonic() - self.started

    def close(self) -> None:
        """Stops the worker processes and writes down the wall time for a resume."""
        write_json(self.workdir / _WALL, {"wall_seconds": self.wall_seconds()})
        if self.verifies:
            self.pool.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _check_shared(workdir: epath.Path) -> None:
    """Raises ConfigError where the hosts' `workdir` is not one and the same folder."""
    if not hosts.several():
        return
    mark = workdir / f".shared.{os.getpid()}"
    if hosts.first():
        mark.write_text("")
    seen = hosts.gather((workdir / hosts.from_first(mark.name)).exists())
    if hosts.first():
        mark.unlink()
    if not all(seen):
        raise ConfigError(
            f"--workdir: {workdir} is not the same folder on process 0 and process "
            f"{seen.index(False)}; use one that all hosts mount, or gs://"
        )


def check_batches(cfg: Config, mesh: Mesh) -> None:
    """Raises ConfigError for a batch whose rows the mesh does not divide."""
    rows = batch_shards(mesh)
    sizes = {"sampler.slots": cfg.sampler.slots}
    if cfg.mode in ("sft", "sft_then_rl"):
        sizes["sft.batch"] = cfg.sft.batch
    if cfg.mode in ("rl", "sft_then_rl"):
        sizes["rl.micro_batch"] = cfg.rl.micro_batch
    if cfg.mode == "pretrain":
        sizes["pretrain.batch"] = cfg.pretrain.batch // cfg.pretrain.accumulate
    for key, size in sizes.items():
        if size % rows:
            raise ConfigError(
                f"{key}: {size} rows are not divided by "
                f"{' x '.join(f'mesh.{axis}' for axis in BATCH_AXES)} = {rows} devices"
            )


def open_session(
    cfg: Config, workdir: str | os.PathLike, devices: Sequence[jax.Device] | None = None
) -> Session:
    """Builds the surroundings of a run on `devices` (default: all); writes workdir/config.json.

    Raises ConfigError or ShardingError naming the key or parameter at fault, before anything
    compiles; CheckpointError for an `init_from` that cannot be read.
    """
    started = time.monotonic()
    if cfg.init_from:
        cfg = like_checkpoint(cfg)
    tokenizer = build_tokenizer(cfg.tokenizer)
    cfg = with_vocab_size(cfg, tokenizer.vocab_size)
    mesh = make_mesh(cfg.mesh, devices)
    hosts.meet(mesh)
    if mesh.size == 1:
        mesh = None
    else:
        check_batches(cfg, mesh)
    dtype, reason = resolve_dtype(cfg.compute_dtype)
    specs = param_specs(cfg.model)
    shardings = None if mesh is None else param_shardings(specs, mesh)
    workdir = as_path(workdir)
    with hosts.together(f"opening {workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        wall = workdir / _WALL
        before = float(json.loads(wall.read_text())["wall_seconds"]) if wall.exists() else 0.0
    _check_shared(workdir)
    session = Session(cfg, workdir, tokenizer, mesh, dtype, specs, shardings, started, before)
    write_json(workdir / "config.json", session.config_json)
    if hosts.first():
        save_tokenizer(cfg.tokenizer, workdir / TOKENIZER)
    found = versions()
    log.info("devices: %d x %s; jax %s", found["devices"], found["device_kind"], found["jax"])
    log.info("compute dtype: %s", reason)
    log.info(
        "model: %s parameters, %s active a token, %d layers (%d MoE)",
        f"{count_params(specs):,}",
        f"{active_params(cfg.model):,}",
        cfg.model.num_layers,
        num_moe_layers(cfg.model),
    )
    return session
