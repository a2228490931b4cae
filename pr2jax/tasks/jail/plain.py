"""Values that cross between processes as plain data: a flat table, no code, no pickle.

None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, deque,
range, Fraction, Decimal, iterators (by what is left in them), NumPy arrays (as lists), and records:
instances of classes written in Python, by class name and attributes. Subclasses of the built-in
types cross as those: what comes out has no methods of its own. Types are kept apart, and values
may be deep, shared or cyclic.
"""

import json
from collections import deque
from decimal import Decimal
from fractions import Fraction

MAX_NODES = 200_000
MAX_BYTES = 8_000_000


class NotPlain(ValueError):
    """A value that has no plain form, or a text that is no table."""


# Kind, type, parts: immutable ones are made of their parts, the others are filled in later.
_IMMUTABLE = {"t": tuple, "z": frozenset}
_MUTABLE = {"l": list, "e": set, "q": deque}
_CONTAINERS = {**_IMMUTABLE, **_MUTABLE}
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))


def encode(value, records=None, max_nodes=MAX_NODES):
    """`value` as bytes. Raises NotPlain where a part of it has no plain form, or it is too large.

    records: names of the classes whose instances may cross; None: all.
    """
    nodes, index, kept = [], {}, []

    def place(item):
        """Where `item` stands in the table; scalars are written, others wait to be opened."""
        if id(item) not in index:
            if len(nodes) >= max_nodes:
                raise NotPlain(f"value of more than {max_nodes} parts")
            index[id(item)] = len(nodes)
            kept.append(item)  # so that its id stays its own
            nodes.append(_scalar(item))
            if nodes[-1] is None:
                waiting.append(item)
        return index[id(item)]

    waiting = []
    root = place(value)
    while waiting:
        item = waiting.pop()
        head, parts = _open(item)
        if head[0] == "o" and records is not None and head[1] not in records:
            raise NotPlain(f"a {head[1]} is no plain data")
        nodes[index[id(item)]] = [*head, [place(part) for part in parts]]
    text = json.dumps([root, nodes], separators=(",", ":")).encode()
    if len(text) > MAX_BYTES:
        raise NotPlain("value too large")
    return text


def _scalar(item):
    """The node of a value without parts, else None."""
    kind = type(item)
    if item is None:
        return ["n"]
    if kind is bool:
        return ["b", int(item)]
    if issubclass(kind, int):
        return ["i", format(int.__index__(item), "x")]
    if issubclass(kind, float):
        return ["f", float.hex(item)]
    if issubclass(kind, str):
        return ["s", str.__str__(item)]
    if issubclass(kind, bytes | bytearray):
        return ["a" if issubclass(kind, bytearray) else "y", bytes(item).hex()]
    if kind is complex:
        return ["c", item.real.hex(), item.imag.hex()]
    if kind is range:
        return ["r", *(format(x, "x") for x in (item.start, item.stop, item.step))]
    if kind is Fraction:
        return ["F", format(item.numerator, "x"), format(item.denominator, "x")]
    if kind is Decimal:
        return ["D", str(item)]
    return None


def _open(item):
    """(what is written before the parts, the parts) of a container, iterator or record."""
    kind = type(item)
    for name, base in _CONTAINERS.items():
        if issubclass(kind, base):
            return [name], list(base.__iter__(item))
    if issubclass(kind, dict):
        return ["d"], [part for pair in dict.items(item) for part in pair]
    if kind.__module__ == "numpy" and hasattr(kind, "tolist"):
        listed = item.tolist()
        return ["l"], listed if isinstance(listed, list) else [listed]
    if isinstance(item, _VIEWS) or (hasattr(kind, "__next__") and kind.__module__ in _STANDARD):
        return ["g"], list(item)
    if kind.__module__ == "builtins" or not hasattr(item, "__dict__"):
        raise NotPlain(f"a {kind.__name__} is no plain data")
    attributes = dict(vars(item))
    return ["o", kind.__name__, [str(n) for n in attributes]], list(attributes.values())


_STANDARD = ("builtins", "itertools")


def decode(text, classes=None, max_nodes=MAX_NODES):
    """What `encode` wrote. Raises NotPlain for anything else.

    classes: name -> class of the records to be made (their `__init__` is not run); a record of
    another class raises NotPlain.
    """
    if len(text) > MAX_BYTES:
        raise NotPlain("value too large")
    try:
        root, nodes = json.loads(text)
        if len(nodes) > max_nodes:
            raise NotPlain(f"value of more than {max_nodes} parts")
        made = [_start(node, classes or {}) for node in nodes]
        _make_immutable(nodes, made)
        for node, value in zip(nodes, made, strict=True):
            _fill(node, value, made)
        return made[root]
    except NotPlain:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise NotPlain(f"not plain data ({type(error).__name__})") from None
    except (RecursionError, MemoryError):
        raise NotPlain("not plain data (too deep)") from None


class _Waiting:
    """Stands where an immutable container is still to be made."""


_WAITING = _Waiting()
_READ = {
    "n": lambda: None,
    "b": bool,
    "i": lambda x: int(x, 16),
    "f": float.fromhex,
    "s": lambda text: str.__str__(text),
    "y": bytes.fromhex,
    "a": bytearray.fromhex,
    "c": lambda a, b: complex(float.fromhex(a), float.fromhex(b)),
    "r": lambda *x: range(*(int(i, 16) for i in x)),
    "F": lambda a, b: Fraction(int(a, 16), int(b, 16)),
    "D": Decimal,
}


def _start(node, classes):
    """The value of a scalar, an empty mutable container, or _WAITING."""
    kind = node[0]
    if kind in _READ:
        return _READ[kind](*node[1:])
    if kind in _MUTABLE:
        return _MUTABLE[kind]()
    if kind == "d":
        return {}
    if kind == "o":
        if node[1] not in classes:
            raise NotPlain(f"a {str(node[1])[:60]} is no plain data")
        return object.__new__(classes[node[1]])
    if kind in _IMMUTABLE or kind == "g":
        return _WAITING
    raise NotPlain("not plain data (kind)")


def _make_immutable(nodes, made):
    """Makes what is _WAITING, parts before wholes, without recursion."""
    for first in range(len(nodes)):
        stack = [first] if made[first] is _WAITING else []
        while stack:
            at = stack[-1]
            kind, places = nodes[at]
            missing = next((p for p in places if made[p] is _WAITING), None)
            if missing is not None:
                if len(stack) > len(nodes):
                    raise NotPlain("not plain data (a tuple within itself)")
                stack.append(missing)
                continue
            parts = [made[p] for p in places]
            made[at] = iter(parts) if kind == "g" else _IMMUTABLE[kind](parts)
            stack.pop()


def _fill(node, value, made):
    kind = node[0]
    if kind in ("l", "q"):
        value.extend(made[p] for p in node[1])
    elif kind == "e":
        value.update(made[p] for p in node[1])
    elif kind == "d":
        keys, values = node[1][::2], node[1][1::2]
        value.update((made[k], made[v]) for k, v in zip(keys, values, strict=True))
    elif kind == "o":
        vars(value).update((n, made[p]) for n, p in zip(node[2], node[3], strict=True))
