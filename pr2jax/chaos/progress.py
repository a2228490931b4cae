"""What the files of a run tell of where it stands."""

from __future__ import annotations

from pathlib import Path


def lines(path: Path) -> int:
    """Whole lines of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stages(workdir: Path) -> list[Path]:
    """Folders of the stages that have begun, in the order they began."""
    found = [path.parent for path in workdir.rglob("checkpoints") if path.is_dir()]
    return sorted(found, key=lambda path: (path / "checkpoints").stat().st_ctime)


def steps(workdir: Path) -> int:
    """Rows of all ledgers: steps done."""
    return sum(lines(stage / "ledger.jsonl") for stage in stages(workdir))


def checkpoints(stage: Path) -> list[Path]:
    """Folders of a stage's complete checkpoints, ascending."""
    found = [p for p in (stage / "checkpoints").iterdir() if p.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def saved(workdir: Path) -> int:
    """Steps of the latest checkpoints, summed over stages."""
    found = [checkpoints(stage) for stage in stages(workdir)]
    return sum(int(steps[-1].name) for steps in found if steps)


def signs(workdir: Path) -> tuple:
    """What changes while a run makes progress: sizes of what it writes."""
    names = ("ledger.jsonl", "metrics.jsonl", "goodput.jsonl", "chaos.log")
    folders = [workdir, *stages(workdir)]
    paths = [folder / name for folder in folders for name in names]
    return tuple(path.stat().st_size if path.exists() else 0 for path in paths)


def amid(workdir: Path, before: int, total: int) -> str:
    """What a killed process was about; `before`: steps done when it began, `total`: of the run."""
    for stage in stages(workdir):
        if list((stage / "checkpoints").glob("*orbax-checkpoint-tmp*")):
            return "writing a checkpoint"
        if list((stage / "journal").glob(".*")):
            return "writing the journal"
        for name in ("metrics.jsonl", "ledger.jsonl"):
            path = stage / name
            if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                return f"writing {name}"
    now = steps(workdir)
    if now >= total:
        return "after the last step"
    return "stepping" if now != before else "start-up"
