"""ConfigDict and dataclasses: there and back, edits, and one clear error per mistake."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import ml_collections
import pytest

from pr2jax.core.config import ConfigError, from_config_dict, to_config_dict


@dataclasses.dataclass(frozen=True)
class Group:
    pattern: str
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 8
    heads: int = 2
    kind: Literal["relu", "silu"] = "silu"

    def validate(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"heads: {self.heads} does not divide width {self.width}")


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = "x"
    rate: float = 0.5
    flag: bool = False
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    clip: float | None = None
    limit: int | None = 3
    inner: Inner = Inner()
    maybe: Inner | None = None
    there: Inner | None = Inner(width=4)
    groups: dict[str, Group] = dataclasses.field(default_factory=dict)
    either: int | str = 1
    doubled: float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self):
        object.__setattr__(self, "doubled", 2 * self.rate)


FULL = Outer(clip=1.0, groups={"head": Group("predictor", 10.0)}, maybe=Inner(2, 1))


@pytest.mark.parametrize("config", [Outer(), FULL])
def test_there_and_back(config):
    assert from_config_dict(Outer, to_config_dict(config)) == config


def test_through_json():
    plain = json.loads(json.dumps(dataclasses.asdict(FULL)))
    del plain["doubled"]
    assert from_config_dict(Outer, plain) == FULL
    assert from_config_dict(Outer, json.loads(to_config_dict(FULL).to_json_best_effort())) == FULL


def test_edits_arrive_and_derived_values_follow():
    cd = to_config_dict(Outer())
    cd.rate = 2
    cd.sizes = (5,)
    cd.clip = 0.1
    cd.limit = None
    cd.inner.width = 16
    cd.there.width = 6
    cd.maybe = to_config_dict(Inner(width=10))
    cd.groups.router = to_config_dict(Group("router"))
    cd.groups.router.scale = 3.0
    got = from_config_dict(Outer, cd)
    assert got == Outer(
        rate=2.0,
        sizes=(5,),
        clip=0.1,
        limit=None,
        inner=Inner(width=16),
        there=Inner(width=6),
        maybe=Inner(width=10),
        groups={"router": Group("router", 3.0)},
    )
    assert got.doubled == 4.0
    cd.there = None
    assert from_config_dict(Outer, cd).there is None


def test_locked_at_every_depth_but_groups():
    cd = to_config_dict(FULL)
    for place in (cd, cd.inner, cd.there, cd.maybe, cd.groups.head):
        with pytest.raises(AttributeError):
            place.no_such_key = 1
    with pytest.raises(TypeError):
        cd.name = 3
    with pytest.raises(TypeError):
        cd.clip = "high"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"inner": {"widht": 1}}, r"^inner\.widht: unknown key; did you mean inner\.width\?$"),
        ({"inner": {"width": 1.5}}, r"^inner\.width: expected int, got float 1\.5$"),
        ({"inner": {"width": True}}, r"^inner\.width: expected int, got bool"),
        ({"inner": {"kind": "silo"}}, r"^inner\.kind: must be one of .* did you mean 'silu'\?$"),
        ({"inner": {"width": 9}}, r"^inner\.heads: 2 does not divide width 9$"),
        ({"maybe": {"width": 9}}, r"^maybe\.heads: 2 does not divide width 9$"),
        ({"inner": 3}, r"^inner: expected Inner, got 3$"),
        ({"inner": None}, r"^inner: expected Inner, got None$"),
        ({"flag": 1}, r"^flag: expected bool, got int 1$"),
        ({"name": None}, r"^name: expected str, got NoneType None$"),
        ({"rate": "fast"}, r"^rate: expected float, got str 'fast'$"),
        ({"sizes": 3}, r"^sizes: expected a tuple, got int 3$"),
        ({"sizes": [1, "b"]}, r"^sizes\[1\]: expected int, got str 'b'$"),
        ({"pair": [1]}, r"^pair: expected 2 values, got 1$"),
        ({"clip": "x"}, r"^clip: expected float, got str 'x'$"),
        ({"either": 1.5}, r"^either: expected int or str, got float 1\.5$"),
        ({"groups": {"a": {}}}, r"^groups\.a\.pattern: missing"),
        ({"groups": {"a": {"pattern": "p", "scael": 1}}}, r"^groups\.a\.scael: .*groups\.a\.scale"),
        ({"doubled": 3.0}, r"^doubled: unknown key"),
    ],
)
@pytest.mark.parametrize("wrap", [dict, ml_collections.ConfigDict])
def test_mistakes_name_their_key(values, message, wrap):
    with pytest.raises(ConfigError, match=message):
        from_config_dict(Outer, wrap(values))


def test_accepts_int_for_float_and_list_for_tuple():
    got = from_config_dict(Outer, {"rate": 1, "sizes": [3, 4], "clip": 2, "either": "b"})
    assert (got.rate, got.sizes, got.clip, got.either) == (1.0, (3, 4), 2.0, "b")
    assert type(got.rate) is float
    assert type(got.clip) is float


def test_unholdable_value_is_named():
    with pytest.raises(ConfigError, match=r"^name: a config cannot hold"):
        to_config_dict(Outer(name=object()))
