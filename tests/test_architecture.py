"""Rooms import one way, and the project has one module system and no torch; read by ast."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pr2jax"
# A room imports from itself and from rooms before it.
ROOMS = [
    "core",
    "models",
    "data",
    "replay",
    "sampler",
    "scaling",
    "emo",
    "tasks",
    "rl",
    "evaluation",
    "train",
    "main",
    "benchmark",
    "doctor",
    "chaos",
]
# Peers run in an environment of their own, as processes: they know torch, and nothing of ours.
PEERS = PACKAGE / "benchmark" / "peers"
FORBIDDEN = ("torch", "transformers", "flax.linen", "flax.nnx", "haiku", "equinox", "tests")


def room_of(path: Path) -> str | None:
    """First component below the package; None for pr2jax/__init__.py."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first == "__init__" else first


def imported(tree: ast.AST, package: list[str]) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a module of `package`, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            found += [(node.lineno, f"{stem}.{alias.name}") for alias in node.names]
    return found


def violations(source: str, room: str | None, package: list[str]) -> list[str]:
    """What a module of `room` imports and may not."""
    bad = []
    for line, name in imported(ast.parse(source), package):
        if any(name == f or name.startswith(f + ".") for f in FORBIDDEN):
            bad.append(f"line {line}: {name} is not used in this project")
        parts = name.split(".")
        if parts[0] != "pr2jax" or room is None or len(parts) < 2:
            continue
        if parts[1] not in ROOMS:
            continue  # an attribute of the package itself, such as pr2jax.__version__
        if ROOMS.index(parts[1]) > ROOMS.index(room):
            bad.append(f"line {line}: {room} imports {name}, a room after it")
    return bad


def test_every_room_is_known():
    unknown = {room_of(p) for p in PACKAGE.rglob("*.py")} - set(ROOMS) - {None}
    assert not unknown, f"not in ROOMS (give it its place in the order): {sorted(unknown)}"


def test_rooms_import_one_way():
    bad = {}
    for path in sorted(set(PACKAGE.rglob("*.py")) - set(PEERS.rglob("*.py"))):
        package = list(path.relative_to(ROOT).parent.parts)
        found = violations(path.read_text(encoding="utf-8"), room_of(path), package)
        if found:
            bad[str(path.relative_to(ROOT))] = found
    assert not bad, bad


def test_peers_and_ours_do_not_import_each_other():
    alone = [*PEERS.glob("*.py"), PACKAGE / "benchmark" / "serve.py"]
    assert len(alone) > 1
    for path in alone:
        names = [name for _, name in imported(ast.parse(path.read_text()), [])]
        assert not [n for n in names if n.split(".")[0] in ("pr2jax", "jax", "tests")], path
    # No package, so that nothing can import it by name.
    assert not (PEERS / "__init__.py").exists()


@pytest.mark.parametrize(
    "source, room, bad",
    [
        ("from pr2jax.core import optim", "models", False),
        ("from pr2jax.models import moe", "core", True),
        ("import pr2jax.train.loop", "rl", True),
        ("from pr2jax import rl", "sampler", True),
        ("from ..rl import types", "sampler", True),
        ("from . import engine", "sampler", False),
        ("def f():\n    from pr2jax.rl.types import RLConfig", "replay", True),
        ("import torch.nn", "rl", True),
        ("from flax import linen as nn", "models", True),
        ("from flax import struct", "models", False),
    ],
)
def test_the_check_sees_them(source, room, bad):
    assert bool(violations(source, room, ["pr2jax", room])) is bad
