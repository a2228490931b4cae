"""What the text of a compiled program says: collectives times the trips of their loops, products.

A compiler's own cost figures count the body of a loop once. Here every computation is walked from
the entry, and what stands in a loop counts as often as the loop turns, loops within loops
multiplied. All sizes are bytes on one device.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|token|opaque|[subcf]f?\d+\w*)\[([\d,<=]*)\]")
_NAMES = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|called_computations"
    r"|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_HEAD = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")
# Ends of an asynchronous operation: its start told everything.
_ENDS = ("async-update", "async-done")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `shape` is its result's type as written, `rest` all that follows the operands."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str

    @property
    def op_name(self) -> str:
        """Where it comes from: jit(f)/.../scope/operation."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def channel(self) -> str:
        """Of a collective: the same for the steps of one; "" where there is none."""
        found = re.search(r"channel_id=(\d+)", self.rest)
        return found[1] if found else ""

    def called(self) -> Iterator[tuple[str, str]]:
        """(attribute, computation) of each computation that it runs."""
        for attribute, names in _NAMES.findall(self.rest):
            for name in re.findall(r"[\w.\-]+", names):
                yield attribute, name


@dataclasses.dataclass(frozen=True)
class Program:
    """A module's text by computation, each computation by instruction."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of collective in one run of a program.

    Attributes:
      count: executions, trips of loops multiplied.
      bytes: what passes through a device: the result of an all-gather, else the operands (of
        ragged-all-to-all the operand buffer, whatever of it is sent).
      wire_dtype: element type that most of the bytes have.
    """

    count: int
    bytes: int
    wire_dtype: str


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product (dot, or a convolution made of one) as the compiler left it.

    Attributes:
      op_name: where it comes from.
      dtypes: element types of the two operands.
      precision: "default", "high" or "highest" (the lower of the two operands').
    """

    op_name: str
    dtypes: tuple[str, str]
    precision: str


def shape_bytes(shape: str) -> int:
    """Bytes of a type as written, a tuple's members added; without the padding of tiles."""
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        if dtype in ("token", "opaque"):
            continue
        count = math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d)
        total += -(-count * _bits(dtype) // 8)
    return total


def _bits(dtype: str) -> int:
    found = _BITS.get(dtype) or re.match(r"[suf](\d+)", dtype)
    if not found:
        raise ValueError(f"the size of the element type {dtype!r} is not known")
    return found if isinstance(found, int) else int(found[1])


def _balanced(text: str, start: int) -> int:
    """Index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    return len(text)


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if not head:
        return None
    at = head.end()
    end = _balanced(line, at) if line[at] == "(" else line.find(" ", at)
    shape = line[at:end]
    op = re.match(r"\s*([\w\-]+)\(", line[end:])
    if not op:
        return None
    begin = end + op.end() - 1
    close = _balanced(line, begin)
    inside = line[begin + 1 : close - 1]
    # With or without its type before it, an operand ends in its name.
    inside = re.sub(r"/\*.*?\*/", "", inside)
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip())
    return Instruction(head[1], shape, op[1], operands, line[close:])


def _split(text: str) -> list[str]:
    """At commas outside all brackets."""
    if "(" not in text and "[" not in text and "{" not in text:
        return text.split(",")
    parts, depth, last = [], 0, 0
    for found in re.finditer(r"[(\[{}\]),]", text):
        if found[0] == ",":
            if depth == 0:
                parts.append(text[last : found.start()])
                last = found.end()
        else:
            depth += 1 if found[0] in "([{" else -1
    return [*parts, text[last:]]


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, with an instruction that goes on over several (a kernel's metadata) made one."""
    held = ""
    for line in text.splitlines():
        if held and not _HEAD.match(line) and not _END.match(line):
            held += line
            continue
        if held:
            yield held
            held = ""
        if _HEAD.match(line):
            held = line
        else:
            yield line
    if held:
        yield held


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`. Raises ValueError where there is no entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in _logical_lines(text):
        if current is None:
            found = _COMPUTATION.match(line)
            if found and not line.startswith("HloModule"):
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif _END.match(line):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation in the program's text")
    return Program(computations, entry)


def trips(loop: Instruction, program: Program) -> int | None:
    """How often a while loop turns, at most: what the compiler says of it, else the one integer
    that its condition compares with (a loop counts from 0); None where neither tells."""
    told = re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest)
    if told:
        return int(told[1])
    condition = next((name for key, name in loop.called() if key == "condition"), None)
    compared, any_of = set(), set()
    for name in _reachable(condition, program):
        computation = program.computations[name]
        constants = {
            i.name: int(i.operands[0])
            for i in computation.values()
            if i.op == "constant" and re.match(r"[su](32|64)\[\]", i.shape)
        }
        any_of |= set(constants.values())
        for one in computation.values():
            if one.op == "compare":
                compared |= {constants[n] for n in one.operands if n in constants}
    found = compared or any_of
    return found.pop() if len(found) == 1 else None


def _reachable(name: str | None, program: Program) -> set[str]:
    seen, todo = set(), [name]
    while todo:
        one = todo.pop()
        if one in program.computations and one not in seen:
            seen.add(one)
            calls = (i.called() for i in program.computations[one].values())
            todo += [other for found in calls for _, other in found]
    return seen


def executions(program: Program, unknown: int = 1) -> tuple[dict[str, int], list[str]]:
    """How often each computation runs, and the loops whose trips nothing tells.

    `unknown`: trips of such a loop, unless it stands in another such: that one counts once.
    Each branch of a conditional counts as if it were taken.
    """
    times: dict[str, int] = {}
    untold: list[str] = []

    def visit(name: str, count: int, inside: bool) -> None:
        times[name] = times.get(name, 0) + count
        for one in program.computations[name].values():
            if one.op in _ENDS:
                continue
            turns, deeper = 1, inside
            if one.op == "while":
                known = trips(one, program)
                if known is None:
                    turns, deeper = (1 if inside else unknown), True
                    untold.append(one.name)
                else:
                    turns = known
            for _, other in one.called():
                if other in program.computations:
                    visit(other, count * turns, deeper)

    visit(program.entry, 1, False)
    return times, sorted(set(untold))


def _operand_shapes(one: Instruction, computation: dict[str, Instruction]) -> list[str]:
    return [computation[name].shape for name in one.operands if name in computation]


def _in_steps(program: Program) -> set[str]:
    """Channels of collectives that a TPU runs in steps, hidden behind computation: they stand in
    the computation of their start, and again in that of each later step."""
    return {
        channel
        for computation in program.computations.values()
        if _starts(computation)
        for one in computation.values()
        if one.op in COLLECTIVES and (channel := one.channel)
    }


def _starts(computation: dict[str, Instruction]) -> bool:
    return any(
        one.op == "custom-call" and 'custom_call_target="AsyncCollectiveStart"' in one.rest
        for one in computation.values()
    )


def collectives(program: Program, unknown: int = 1) -> dict[str, Traffic]:
    """Traffic of each kind of collective that the program has (`executions` for `unknown`)."""
    times, _ = executions(program, unknown)
    in_steps = _in_steps(program)
    counts: dict[str, int] = collections.Counter()
    sizes: dict[str, dict[str, int]] = {}
    for name, count in times.items():
        computation = program.computations[name]
        starts = _starts(computation)
        for one in computation.values():
            kind = one.op.removesuffix("-start")
            if kind not in COLLECTIVES or (one.channel in in_steps and not starts):
                continue
            operands = _operand_shapes(one, computation)
            moved = operands[:1] if kind == "ragged-all-to-all" else operands
            size = sum(map(shape_bytes, moved))
            if kind == "all-gather":
                # What starts one gives (operands, results).
                size = shape_bytes(one.shape) - (size if one.op != kind else 0)
            if name.startswith("all-reduce-scatter"):  # how a TPU writes one, as a fusion
                kind = "reduce-scatter"
            dtype = _ARRAY.search(one.shape)
            counts[kind] += count
            sizes.setdefault(kind, collections.Counter())[dtype[1] if dtype else ""] += count * size
    return {
        kind: Traffic(counts[kind], sum(by_type.values()), max(by_type, key=by_type.get))
        for kind, by_type in sorted(sizes.items())
    }


def products(program: Program) -> list[Product]:
    """Every matrix product that stands in the text, once, loops not multiplied."""
    return [
        Product(one.op_name, _dtypes(one, computation), _precision(one))
        for computation in program.computations.values()
        for one in computation.values()
        if one.op in ("dot", "convolution")
    ]


def _dtypes(one: Instruction, computation: dict[str, Instruction]) -> tuple[str, str]:
    found = [_ARRAY.search(shape) for shape in _operand_shapes(one, computation)[:2]]
    first, second = ([m[1] if m else "" for m in found] + ["", ""])[:2]
    return first, second


def _precision(one: Instruction) -> str:
    found = re.search(r"operand_precision=\{([\w,]+)\}", one.rest)
    levels = found[1].split(",") if found else ["default"]
    order = ("default", "high", "highest")
    return min(levels, key=lambda level: order.index(level) if level in order else 0)


def kernels(program: Program, unknown: int = 1) -> dict[str, int]:
    """Executions of kernels written by hand (their name, else their scope) and of the compiler's
    own grouped products (ragged-dot)."""
    times, _ = executions(program, unknown)
    counts: dict[str, int] = collections.Counter()
    for name, count in times.items():
        for one in program.computations[name].values():
            target = re.search(r'custom_call_target="([^"]*)"', one.rest)
            if one.op != "custom-call" or not target:
                continue
            if target[1] == "tpu_custom_call":
                counts[_kernel_name(one)] += count
            elif target[1].startswith("ragged-dot") and not target[1].endswith("metadata"):
                counts[target[1]] += count
    return dict(sorted(counts.items()))


def _kernel_name(one: Instruction) -> str:
    told = re.search(r"kernel_name\W+([\w.\-]+)", one.rest)
    parts = [part for part in one.op_name.split("/") if part not in ("pallas_call", "")]
    return told[1] if told else (parts or ["kernel"])[-1]


@functools.cache
def scope_pattern(scope: str) -> re.Pattern[str]:
    """Matches an op_name within `jax.named_scope(scope)`, also where it was differentiated."""
    return re.compile(rf"(^|[/(]){re.escape(scope)}([)/]|$)")
