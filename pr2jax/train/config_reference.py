"""docs/config.md, made of the configuration's dataclasses: python -m pr2jax.train.config_reference

The dataclasses are the only schema, and their docstrings the only place where a key is explained;
this page repeats both, so it cannot say anything else than the code does (tests/test_docs.py).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any, Literal, Union

from pr2jax.train.config import Config

_HEAD = """# Configuration

<!-- Made by `python -m pr2jax.train.config_reference > docs/config.md`; edit the docstrings. -->

Every key of a run, with its type, default and meaning. A config file in `configs/` sets some of
them, `--config.section.key=value` on the command line sets more, last; a key that does not exist,
or a value that cannot be, is one line of error before anything compiles:

```
[pr2jax] ConfigError: rl.mini_steps: 3 does not divide prompts_per_batch=8
    (a mini-batch is of whole groups)
```

Tuples are put as `--config.eval.ks='(1,8)'`, entries of a mapping by their name, as in
`--config.rl.optim.groups.predictor.lr_multiplier=10.0`. What a run resolved all this to is in its
`WORKDIR/config.json`. The defaults here are the dataclasses'; a config file builds its own, so
what it says at its top counts for it. A section's own default is given where it is not its type's.
"""


@dataclasses.dataclass(frozen=True)
class _Section:
    """A dataclass of the configuration and the keys under which it stands."""

    cls: type
    paths: list[str]


def reference() -> str:
    """The page, as Markdown."""
    sections = _sections()
    rows = [
        f"| {', '.join(f'`{path}`' for path in section.paths if path) or '(top)'} "
        f"| [{section.cls.__name__}](#{section.cls.__name__.lower()}) |"
        for section in sections
    ]
    parts = [_HEAD, "| keys under | described at |", "|---|---|", *rows]
    parts += [_render(section, sections) for section in sections]
    return "\n".join(parts) + "\n"


def _sections() -> list[_Section]:
    """Every dataclass below Config, a parent before its children."""
    found: dict[type, list[str]] = {}

    def visit(cls: type, path: str) -> None:
        known = cls in found
        found.setdefault(cls, []).append(path)
        if known:
            return
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            child, suffix = _held(hints[field.name])
            if child is not None:
                visit(child, f"{path}.{field.name}{suffix}".lstrip("."))

    visit(Config, "")
    return [_Section(cls, paths) for cls, paths in found.items()]


def _held(hint: Any) -> tuple[type | None, str]:
    """The dataclass that a field holds, and what its own key adds: ".NAME" in a mapping, "[i]" in
    a tuple."""
    if typing.get_origin(hint) is dict:
        return _held(typing.get_args(hint)[1])[0], ".NAME"
    if typing.get_origin(hint) is tuple:
        return _held(typing.get_args(hint)[0])[0], "[i]"
    if typing.get_origin(hint) in (Union, types.UnionType):
        held = [_held(member)[0] for member in typing.get_args(hint)]
        return next((cls for cls in held if cls is not None), None), ""
    return (hint, "") if dataclasses.is_dataclass(hint) else (None, "")


def _render(section: _Section, sections: list[_Section]) -> str:
    cls = section.cls
    prose, lines = describe(cls)
    hints = typing.get_type_hints(cls)
    out = [f"\n## {cls.__name__}\n"]
    named = ", ".join(f"`{path}`" for path in section.paths if path)
    if named:
        out.append(f"Keys under {named}.\n")
    out += [prose + "\n", "| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        child, _ = _held(hints[field.name])
        kind = _type(hints[field.name])
        if child is not None:
            kind = kind.replace(child.__name__, f"[{child.__name__}](#{child.__name__.lower()})")
        meaning = lines.get(field.name) or ("above" if re.search(_named(field), prose) else "")
        if child is not None and not lines.get(field.name):
            meaning = describe(child)[0].partition("\n")[0]
        out.append(f"| `{field.name}` | {kind} | {_default(field)} | {_cell(meaning)} |")
    return "\n".join(out)


def describe(cls: type) -> tuple[str, dict[str, str]]:
    """A class's docstring as (prose, {field: meaning}).

    An entry is "name: text" or "a, b: text" of the class's fields, with indented lines after it;
    all else is prose.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    prose: list[str] = []
    found: dict[str, str] = {}
    current: list[str] = []
    indent = -1
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        depth = len(line) - len(line.lstrip())
        entry = re.fullmatch(r"\s*([a-z]\w*(?:, [a-z]\w*)*): (.*)", line)
        if entry and set(own := entry[1].split(", ")) <= names:
            current, indent = own, depth
            found |= dict.fromkeys(own, entry[2])
        elif current and depth > indent and line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        elif line.strip() != "Attributes:":
            current = []
            prose.append(line.strip())
    for name, text in list(found.items()):
        # "url: ... . model: ..." on one line.
        first, *rest = re.split(rf"(?<=[.;]) ({'|'.join(names)}): ", text)
        found |= {name: first} | dict(zip(rest[::2], rest[1::2], strict=True))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(prose)).strip(), found


def _named(field: dataclasses.Field) -> str:
    return rf"\b{field.name}\b"


def _type(hint: Any) -> str:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{member!r}`" for member in members)
    if origin in (Union, types.UnionType):
        return " or ".join("None" if m is type(None) else _type(m) for m in members)
    if origin is tuple:
        return f"tuple of {_type(members[0])}"
    if origin is dict:
        return f"{_type(members[1])} by name"
    return hint.__name__


def _default(field: dataclasses.Field) -> str:
    """The default; of a section, only where it is not its type's own."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    text = _value(value)
    return f"`{text}`" if text else ""


def _value(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        parts = []
        for field in dataclasses.fields(value):
            own = getattr(value, field.name)
            if field.default is not dataclasses.MISSING:
                plain = field.default
            elif field.default_factory is not dataclasses.MISSING:
                plain = field.default_factory()
            else:
                plain = dataclasses.MISSING
            if own != plain:
                parts.append(f"{field.name}={_value(own)}")
        return ", ".join(parts)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_value(item) or 'defaults'}" for name, item in value.items())
    return repr(value)


def _cell(text: str) -> str:
    """Text that can stand in a table's cell."""
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    print(reference(), end="")
