"""What a larger pool costs at the same active parameters: `python -m pr2jax.benchmark experts`."""

from __future__ import annotations

import statistics
from typing import Any

from pr2jax.benchmark import table
from pr2jax.benchmark.commands import OPTIMIZER, Options, bench, report_rows
from pr2jax.benchmark.compare import ratio, round_seconds
from pr2jax.benchmark.workload import experts_model, tokens

POOLS, SMOKE_POOLS = (8, 16, 32, 64, 128), (2, 4)
# EMO (arXiv 2605.13247): step time at 128 experts over that at 8, on its accelerators.
PAPER = 1.72
_PARTS = ("experts", "layer", "update")


def experts(options: Options) -> tuple[dict[str, Any], str]:
    """Step and MoE-layer time by the number of experts, k fixed; the report and its text."""
    s, pools = options.sizes, SMOKE_POOLS if options.smoke else POOLS
    vocab = experts_model(options.smoke, pools[0], options.overrides).vocab_size
    ids = tokens((s.batch, s.length), vocab).tolist()
    with bench(options) as work:
        for pool in pools:
            work.ours("experts", f"{pool} experts", tokens=ids, experts=pool, **OPTIMIZER)
        answers = work.measure()
        seconds = [round_seconds(a) for a in answers]
        # Above 1 is what the larger pool costs: seconds(pool) / seconds(the first).
        first = f"{pools[0]} experts"
        ratios = [
            ratio(first, f"{pool} experts", seconds[0], own)
            for pool, own in zip(pools, seconds, strict=True)
        ]
        report = report_rows(work, answers, s.batch * s.length, ratios)
        report["pools"] = [
            {"experts": pool} | {key: entry.ready[key] for key in ("parameters", "active")}
            for pool, entry in zip(pools, work.entries, strict=True)
        ]
    report["check"] = check = _shares(report["rows"])
    report["check"]["paper"] = PAPER
    lines = []
    for row, size, found in zip(report["rows"], report["pools"], ratios, strict=True):
        median = {name: row["parts"][name]["median"] for name in _PARTS}
        whole = row["seconds"]["median"]
        lines.append(
            [
                row["name"],
                f"{size['parameters'] / 1e6:.1f}M",
                table.number(whole),
                f"{found['median']:.2f}x ({found['min']:.2f}-{found['max']:.2f})",
                *(table.number(median[name]) for name in _PARTS),
                table.number(whole - median["layer"] - median["update"]),
                f"{row['share_of_peak']:.0%}",
            ]
        )
    head = ["", "parameters", "s/step", f"over {first}", "experts s", "MoE layers s", "update s"]
    head += ["rest s", "of peak"]
    moe = experts_model(options.smoke, pools[0], options.overrides).moe
    text = [
        f"training step, {s.batch} x {s.length} tokens, k = {moe.top_k}, "
        f"{report['pools'][0]['active'] / 1e6:.1f}M active parameters in all (but the router's)",
        table.render(head, lines),
        f"{pools[-1]} experts over {pools[0]}: step {check['step']:.2f}x, MoE layers "
        f"{check['layer']:.2f}x, their experts {check['experts']:.2f}x, update "
        f"{check['update']:.2f}x (the paper, 8 to 128 on its accelerators: {PAPER}x a step)",
        "of what the step grew: "
        + ", ".join(f"{name} {share:.0%}" for name, share in check["grown"].items()),
        table.peaks_line(report["rows"]),
    ]
    return report, "\n".join(text)


def _shares(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Last over first pool, part by part, and the parts' shares of what the step grew by."""
    first, last = rows[0], rows[-1]
    middle = lambda row, name: statistics.median(row["parts"][name]["all"])
    check: dict[str, Any] = {name: middle(last, name) / middle(first, name) for name in _PARTS}
    check["step"] = last["seconds"]["median"] / first["seconds"]["median"]
    more = last["seconds"]["median"] - first["seconds"]["median"]
    grew = {name: middle(last, name) - middle(first, name) for name in _PARTS}
    shares = {
        "experts' products": grew["experts"],
        "rest of the MoE layers": grew["layer"] - grew["experts"],
        "optimizer's update": grew["update"],
        "everything else": more - grew["layer"] - grew["update"],
    }
    check["grown"] = {name: (value / more if more else 0.0) for name, value in shares.items()}
    return check
