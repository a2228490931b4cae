"""Plain data between processes: what crosses, as what, and what hostile tables do."""

import contextlib
import importlib.util
import json
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

import pr2jax.tasks.jail

_PATH = Path(pr2jax.tasks.jail.__file__).with_name("plain.py")


@pytest.fixture(scope="module")
def plain():
    spec = importlib.util.spec_from_file_location("plain_alone", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alike(a, b):
    """Equal, of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(map(alike, a.values(), b.values()))
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b


def values(rng, depth=0):
    leaf = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.randint(-(10**30), 10**30),
        lambda: rng.choice([0.0, -0.0, 1e-320, math.inf, -math.inf, math.nan, rng.random()]),
        lambda: "".join(map(chr, rng.choices([9, 34, 65, 233, 0x1F600, 0xD800], k=3))),
        lambda: rng.randbytes(3),
        lambda: bytearray(rng.randbytes(2)),
        lambda: complex(rng.random(), -0.0),
        lambda: range(rng.randint(0, 9), 99, rng.randint(1, 5)),
        lambda: Fraction(rng.randint(-9, 9), rng.randint(1, 9)),
        lambda: Decimal("1.50"),
        lambda: frozenset(rng.sample(range(9), 3)),
    ]
    if depth > 3 or rng.random() < 0.4:
        return rng.choice(leaf)()
    parts = [values(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    make = rng.choice([list, tuple, deque, lambda p: {f"k{i}": x for i, x in enumerate(p)}])
    return make(parts)


def test_values_come_back_as_they_were(plain):
    rng = random.Random(0)
    for _ in range(500):
        value = values(rng)
        assert alike(plain.decode(plain.encode(value)), value)


def test_subclasses_cross_as_the_built_in_type(plain):
    class Number(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    pair = namedtuple("pair", "a b")
    given = [Number(3), pair(1, 2), Counter("aab"), OrderedDict(x=1), defaultdict(list, y=[1])]
    found = plain.decode(plain.encode(given))
    assert alike(found, [3, (1, 2), {"a": 2, "b": 1}, {"x": 1}, {"y": [1]}])
    assert found[0] != 4


def test_sharing_cycles_and_depth_survive(plain):
    inner = [1]
    a, b = plain.decode(plain.encode([inner, inner]))
    assert a is b
    cycle = []
    cycle.append((cycle,))
    found = plain.decode(plain.encode(cycle))
    assert found[0][0] is found
    deep = ()
    for _ in range(20_000):
        deep = (deep,)
    found, depth = plain.decode(plain.encode(deep)), 0
    while found:
        found, depth = found[0], depth + 1
    assert depth == 20_000


def test_records_only_of_known_classes_and_without_their_code(plain):
    class Point:
        def __init__(self, x):
            raise AssertionError("must not run")

    point = object.__new__(Point)
    point.x = [1]
    text = plain.encode(point)
    found = plain.decode(text, {"Point": Point})
    assert type(found) is Point
    assert vars(found) == {"x": [1]}
    with pytest.raises(plain.NotPlain, match="a Point is no plain data"):
        plain.decode(text)
    with pytest.raises(plain.NotPlain, match="a Point is no plain data"):
        plain.encode(point, records=["Other"])


@pytest.mark.parametrize("value", [open, len, type, object(), lambda: 1, int, json, Ellipsis])
def test_what_has_no_plain_form(plain, value):
    with pytest.raises(plain.NotPlain):
        plain.encode(value, records=())


def test_limits_of_size(plain):
    with pytest.raises(plain.NotPlain, match="more than 100 parts"):
        plain.encode(list(range(1000)), max_nodes=100)
    with pytest.raises(plain.NotPlain, match="too large"):
        plain.encode("x" * (plain.MAX_BYTES + 1))
    with pytest.raises(plain.NotPlain, match="too large"):
        plain.decode(b" " * (plain.MAX_BYTES + 1))


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"[", b"null", b"{}", b"[0,[]]", b"[0,{}]", b"[9,[]]", b'["a",[["n"]]]'),
        *(b'[0,[["t",[0]]]]', b'[0,[["z",[1]],["t",[0]]]]', b'[0,[["l",[5]]]]', b'[0,[["q"]]]'),
        *(b'[0,[["i","zz"]]]', b'[0,[["i",5]]]', b'[0,[["f","x"]]]', b'[0,[["y","0"]]]'),
        *(b'[0,[["r","0","1","0"]]]', b'[0,[["F","1","0"]]]', b'[0,[["D","x"]]]', b'[0,[["?"]]]'),
        *(b'[0,[["d",[1]],["n"]]]', b'[0,[["d",[1,1]],["l",[]]]]', b'[0,[["e",[1]],["l",[]]]]'),
        *(b'[0,[["o","X",["a"],[0]]]]', b'[0,[["o",[],[],[]]]]', b"[0,[[]]]", b"[0,[7]]"),
        *(b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b'[0,[["s"]]]', b'[0,[["o","X"]]]'),
    ],
)
def test_hostile_tables_are_refused(plain, text):
    with pytest.raises(plain.NotPlain):
        plain.decode(text)


def test_random_damage_never_raises_anything_else(plain):
    rng = random.Random(1)
    for _ in range(3000):
        text = bytearray(plain.encode(values(rng)))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 2))
        with contextlib.suppress(plain.NotPlain):
            plain.decode(bytes(text))
