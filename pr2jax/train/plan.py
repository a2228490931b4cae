"""Plans: "I have C rollouts (or tokens): which n, B_p, M and learning rate?"

Out of a law of one's own sweep (train/budget_report.py), or of the published one. A plan is a file
that a GRPO run takes (`--config.rl_plan=FILE`): strictly on-policy, the learning rate as the square
root of the batch, a short warm-up and then constant.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.fetch import fetched
from pr2jax.core.metrics import write_json, write_summary
from pr2jax.core.store import as_path
from pr2jax.rl.types import RLConfig
from pr2jax.scaling.sampling_law import (
    BASE_BATCH,
    BASE_RATE,
    PUBLISHED,
    PUBLISHED_PROMPTS,
    WARMUP_STEPS,
    SamplingLaw,
    square_root_rate,
)
from pr2jax.train.config import Config
from pr2jax.train.study_config import PlanConfig

log = logging.getLogger("pr2jax")

PLAN, LAW = "plan.json", "law.json"
HARD_PROMPTS = 64  # "a moderate B_p (>= 32, more on hard sets)"


@dataclasses.dataclass(frozen=True)
class Source:
    """A law and what is known of where it comes from (None: not known).

    `rate` is the learning rate at `rows` rows; `compute_range` and `n_range` are what the law was
    fitted on.
    """

    law: SamplingLaw
    name: str
    prompts: int
    regime: str
    rate: float
    rows: float
    compute_range: tuple[float, float] | None = None
    n_range: tuple[float, float] | None = None
    tokens: float | None = None
    warnings: tuple[str, ...] = ()


def published(plan: PlanConfig) -> Source:
    """The IsoCompute study's law for a regime, at B_p = 32 or over all of its B_p."""
    asked = plan.regime or "easy"
    regime = "easy" if asked == "easy" else "hard"
    warnings = ["law and learning rate are a 7B model's: where you can, fit a sweep of your own"]
    if not plan.regime:
        warnings.append("taken to be easy problems (plan.regime): avg@16 of the base in [0.3, 0.6]")
    if asked not in ("easy", "hard"):
        warnings.append(f"no law is published for {asked} problems: this is the hard ones'")
    usual = PUBLISHED_PROMPTS if asked == "easy" else HARD_PROMPTS
    prompts = plan.prompts or usual
    fitted = f"B_p={PUBLISHED_PROMPTS}" if prompts == PUBLISHED_PROMPTS else "joint"
    return Source(
        law=PUBLISHED[regime, fitted],
        name=f"published (IsoCompute, 7B model, {regime}, {fitted})",
        prompts=prompts,
        regime=asked,
        rate=BASE_RATE,
        rows=BASE_BATCH,
        warnings=tuple(warnings),
    )


def own(plan: PlanConfig) -> Source:
    """The law of `plan.fit`. Raises ConfigError("plan.fit: ...")."""
    path = Path(fetched(plan.fit))
    path = path / LAW if path.is_dir() else path
    found = _read(path, "plan.fit")
    try:
        law = from_config_dict(SamplingLaw, found["law"], "law")
        low, high = map(float, found["compute_range"])
        least, most = map(float, found["n_range"])
        growth = found["growth_interval"] and [float(x) for x in found["growth_interval"]]
        prompts, regime = int(found["prompts"]), str(found["regime"])
        recipe, tokens = found["recipe"], found["tokens_per_rollout"]
        rate, rows = (float(recipe[k]) for k in ("learning_rate", "rows")) if recipe else (0, 0)
        tokens = None if tokens is None else float(tokens)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"plan.fit: {path} is no law of a sweep ({error!r})") from None
    warnings = []
    if not law.amplitude:
        warnings.append("n* did not grow over the sweep's range, so it is the same at every C")
    elif not growth:
        warnings.append("the sweep had one seed: whether n* grows is not known")
    elif growth[0] <= 1.0:
        warnings.append(
            f"whether n* grows is not settled: by a factor of {growth[0]:.2f} to {growth[1]:.2f} "
            "over the sweep's range"
        )
    if plan.regime not in ("", regime):
        warnings.append(f"the law is of {regime} problems, not of {plan.regime} ones")
    if plan.prompts and plan.prompts != prompts:
        warnings.append(f"the law was fitted at B_p = {prompts}, not {plan.prompts}")
    if not rate:
        rate, rows = BASE_RATE, BASE_BATCH
        warnings.append("the sweep's learning rate is not known: the published one is taken")
    return Source(
        law=law,
        name=f"own sweep ({path})",
        prompts=plan.prompts or prompts,
        regime=regime,
        rate=rate,
        rows=rows,
        compute_range=(low, high),
        n_range=(least, most),
        tokens=tokens,
        warnings=tuple(warnings),
    )


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: {path} holds no JSON object")
    return found


def fit_batch(n: float, prompts: int, micro_batch: int) -> int:
    """The whole n >= 2 nearest to `n` (as a ratio) whose batch of prompts x n rows is cut into
    micro-batches without a rest.

    On-policy there is one mini-step a batch; the mesh divides micro-batches, so a batch of whole
    ones is divided, too.
    """
    step = micro_batch // math.gcd(prompts, micro_batch)
    below = max(math.floor(n / step), 1) * step
    allowed = [k for k in (below, below + step, below + 2 * step) if k >= 2]
    return min(allowed, key=lambda k: abs(math.log(k / n)))


def make(cfg: Config) -> dict[str, Any]:
    """The plan of `cfg.plan`, for batches that `cfg.rl.micro_batch` cuts (module docstring).

    Keys: n, prompts (B_p), steps (M), learning_rate, warmup_steps, rollouts (n B_p M), compute
    (what was asked for), n_exact (the law's), source, regime, law, scale (learning rate and the
    rows that it is for), recipe, warnings. Raises ConfigError("plan.KEY: why").
    """
    plan = cfg.plan
    source = own(plan) if plan.fit else published(plan)
    warnings = list(source.warnings)
    rollouts = plan.compute
    if plan.unit == "tokens":
        tokens = plan.tokens_per_rollout or source.tokens
        if not tokens:
            raise ConfigError(
                "plan.tokens_per_rollout: must be given where compute is in tokens, since "
                f"{source.name} does not say"
            )
        rollouts = plan.compute / tokens
    exact = float(source.law.optimal_n(rollouts))
    n = fit_batch(exact, source.prompts, cfg.rl.micro_batch)
    if abs(n - exact) > 0.5:
        warnings.append(
            f"n {exact:.1f} -> {n}: {source.prompts} x n rows must be whole micro-batches of "
            f"rl.micro_batch={cfg.rl.micro_batch}"
        )
    rows = n * source.prompts
    steps = int(rollouts // rows)
    if steps < 1:
        raise ConfigError(
            f"plan.compute: {rollouts:,.0f} rollouts are less than one batch of {source.prompts} "
            f"x {n} = {rows}"
        )
    if steps <= WARMUP_STEPS:
        warnings.append(f"{steps} updates are hardly more than the {WARMUP_STEPS} of warm-up")
    if source.compute_range is not None:
        low, high = source.compute_range
        if not low <= rollouts <= high:
            warnings.append(f"extrapolated: fitted on {low:,.0f} to {high:,.0f} rollouts")
    if source.n_range is not None and not source.n_range[0] <= exact <= source.n_range[1]:
        warnings.append(f"n = {exact:.1f} lies outside the n that were run")
    if source.law.amplitude and rollouts >= source.law.knee:
        warnings.append(
            f"n* has saturated (at {source.law.saturation:.0f}): more compute goes into updates"
        )
    return {
        "n": n,
        "prompts": source.prompts,
        "steps": steps,
        "learning_rate": square_root_rate(rows, source.rate, source.rows),
        "warmup_steps": min(WARMUP_STEPS, steps),
        "rollouts": rows * steps,
        "compute": {"value": plan.compute, "unit": plan.unit, "rollouts": rollouts},
        "n_exact": exact,
        "source": source.name,
        "regime": source.regime,
        "law": dataclasses.asdict(source.law),
        "scale": {"learning_rate": source.rate, "rows": source.rows},
        "recipe": "strictly on-policy, temperature 0.6, truncated importance sampling; KL and "
        "entropy terms " + ("on" if source.regime == "easy" else "off"),
        "warnings": warnings,
    }


def table(plan: Mapping[str, Any]) -> str:
    """A plan for people."""
    asked = plan["compute"]
    rows = [
        ("compute", f"{asked['value']:,.0f} {asked['unit']} = {asked['rollouts']:,.0f} rollouts"),
        ("n, samples a prompt", f"{plan['n']} (the law: {plan['n_exact']:.1f})"),
        ("B_p, prompts a batch", str(plan["prompts"])),
        ("M, updates", f"{plan['steps']:,} ({plan['rollouts']:,} rollouts)"),
        ("learning rate", f"{plan['learning_rate']:.4g}, {plan['warmup_steps']} steps of warm-up"),
        ("recipe", plan["recipe"]),
        ("law", plan["source"]),
        *(("note", text) for text in plan["warnings"]),
    ]
    return "\n".join(f"  {name:<22}{value}" for name, value in rows)


def run_plan(cfg: Config, workdir: str, profile_steps: int = 0) -> None:
    """Writes WORKDIR/plan.json and prints it. Raises ConfigError."""
    if profile_steps:
        raise ConfigError("--profile: only for modes that train")
    plan = make(cfg)
    path = as_path(workdir) / PLAN
    write_json(path, plan)
    write_summary(workdir, {"mode": cfg.mode, "plan": plan, "config": dataclasses.asdict(cfg)})
    print(f"{table(plan)}\n  a GRPO run takes it: --config.rl_plan={path}", flush=True)


# --------------------------------------------------------------- a run's plan


def configure(values: ConfigDict | Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """The configuration of `values`, with what their `rl_plan` says in place of their own.

    given: what the command line sets, by dotted key: a planned key of another value there is a
    conflict. n is rounded once more where rl.micro_batch does not cut the plan's batch; learning
    rate and updates follow it. Raises ConfigError naming the key.
    """
    if not values.get("rl_plan"):
        return from_config_dict(Config, values)
    values = values.to_dict() if isinstance(values, ConfigDict) else copy.deepcopy(dict(values))
    default = RLConfig()
    rl = values["rl"] = {"optim": dataclasses.asdict(default.optim)} | values.get("rl", {})
    if values.get("mode", "rl") not in ("rl", "sft_then_rl"):
        raise ConfigError(f"rl_plan: mode {values['mode']!r} has no RL to plan")
    if rl.get("dynamic_sampling", default.dynamic_sampling):
        raise ConfigError("rl.dynamic_sampling: draws rollouts that rl_plan's C does not count")
    path = Path(fetched(values["rl_plan"]))
    path = path / PLAN if path.is_dir() else path
    micro_batch = rl.get("micro_batch", default.micro_batch)
    planned = _settings(_read(path, "rl_plan"), path, micro_batch)
    for key, value in planned.items():
        if key in given and given[key] != value:
            raise ConfigError(f"{key}: {given[key]} is given, and rl_plan={path} says {value}")
        *parents, last = key.split(".")
        at = values
        for name in parents:
            at = at.setdefault(name, {})
        at[last] = value
    log.info("plan %s: %s", path, ", ".join(f"{key}={value}" for key, value in planned.items()))
    try:
        return from_config_dict(Config, values)
    except ConfigError as error:
        raise ConfigError(f"{error} (as rl_plan={path} has it)") from None


def _settings(plan: dict[str, Any], path: Path, micro_batch: int) -> dict[str, Any]:
    """What a plan sets, by dotted key. Raises ConfigError("rl_plan: ...")."""
    counts = ("n", "prompts", "steps", "warmup_steps")
    for key in counts:
        if type(plan.get(key)) is not int or plan[key] < 1:
            raise ConfigError(f"rl_plan: {path}: {key} is {plan.get(key)!r}, not a whole number")
    rate, rollouts = plan.get("learning_rate"), plan["n"] * plan["prompts"] * plan["steps"]
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ConfigError(f"rl_plan: {path}: learning_rate is {rate!r}")
    n, steps = fit_batch(plan["n"], plan["prompts"], micro_batch), plan["steps"]
    if n != plan["n"]:
        steps = max(rollouts // (n * plan["prompts"]), 1)
        rate = square_root_rate(n, rate, plan["n"])
        log.warning(
            "plan: n %d -> %d, %d -> %d updates: rl.micro_batch=%d does not cut %d x %d rows",
            *(plan["n"], n, plan["steps"], steps, micro_batch, plan["prompts"], plan["n"]),
        )
    return {
        "rl.samples_per_prompt": n,
        "rl.prompts_per_batch": plan["prompts"],
        "rl.steps": steps,
        "rl.mini_steps": 1,
        "rl.epochs": 1,
        "rl.optim.learning_rate": float(rate),
        "rl.optim.schedule": "constant",
        "rl.optim.warmup_steps": min(plan["warmup_steps"], steps),
    }
