"""One Arrow schema for rows of many files, whose nested fields do not agree.

Files name other fields in `extra_info`, and give an answer as a text here and as a list there.
A column keeps its type where all rows agree. Where they do not, it is text: scalars as `str` makes
them, lists and objects (without keys that are null) as JSON, which is how `rows.parse_row` reads
an answer. Objects with other keys in other rows become JSON too, except the row, `reward_model`,
`extra_info` and the messages, where a key that a row has not is null.
"""

import json
from collections.abc import Mapping
from typing import Any

Kind = dict[str, Any]  # {"kind": ..., "item": Kind of a list, "fields": {name: Kind}}

_OPEN = ((), ("reward_model",), ("extra_info",), ("prompt", "[]"))
_INT64 = 2**63


def kind_of(value: Any, path: tuple[str, ...] = ()) -> Kind:
    """What a value is: null, bool, int, float, str, list of a kind, struct of kinds, or text."""
    if value is None:
        return {"kind": "null"}
    if isinstance(value, bool):
        return {"kind": "bool"}
    if isinstance(value, int):
        return {"kind": "int" if -_INT64 <= value < _INT64 else "text"}
    if isinstance(value, float):
        return {"kind": "float"}
    if isinstance(value, str):
        return {"kind": "str"}
    if isinstance(value, list):
        item: Kind = {"kind": "null"}
        for element in value:
            item = merge(item, kind_of(element, (*path, "[]")), (*path, "[]"))
        return {"kind": "text"} if item["kind"] == "text" else {"kind": "list", "item": item}
    if isinstance(value, Mapping):
        fields = {str(key): kind_of(v, (*path, str(key))) for key, v in value.items()}
        return _closed({"kind": "struct", "fields": fields}, path)
    return {"kind": "text"}


def _closed(kind: Kind, path: tuple[str, ...]) -> Kind:
    """A struct that Arrow cannot hold (no field), or that holds text by disagreement, is text."""
    fields = kind["fields"]
    vague = not fields or any(f["kind"] == "text" for f in fields.values())
    return {"kind": "text"} if vague and path not in _OPEN else kind


def merge(a: Kind, b: Kind, path: tuple[str, ...] = ()) -> Kind:
    """The kind that holds values of both."""
    if a == b or b["kind"] == "null":
        return a
    if a["kind"] == "null":
        return b
    kinds = {a["kind"], b["kind"]}
    if kinds == {"int", "float"} and path[:1] != ("reward_model",):
        return {"kind": "float"}
    if kinds == {"list"}:
        item = merge(a["item"], b["item"], (*path, "[]"))
        return {"kind": "text"} if item["kind"] == "text" else {"kind": "list", "item": item}
    if kinds == {"struct"}:
        if path not in _OPEN and a["fields"].keys() != b["fields"].keys():
            return {"kind": "text"}
        null: Kind = {"kind": "null"}
        fields = {
            name: merge(a["fields"].get(name, null), b["fields"].get(name, null), (*path, name))
            for name in {**a["fields"], **b["fields"]}
        }
        return _closed({"kind": "struct", "fields": fields}, path)
    return {"kind": "text"}


def fitted(value: Any, kind: Kind) -> Any:
    """`value` as a column of `kind` holds it."""
    if value is None:
        return None
    if kind["kind"] == "text":
        if isinstance(value, str):
            return value
        if isinstance(value, Mapping):
            # In a column of objects each has the keys of all.
            value = {key: v for key, v in value.items() if v is not None}
        nested = isinstance(value, list | Mapping)
        return json.dumps(value, ensure_ascii=False, default=str) if nested else str(value)
    if kind["kind"] == "list":
        return [fitted(v, kind["item"]) for v in value]
    if kind["kind"] == "struct":
        return {name: fitted(value.get(name), of) for name, of in kind["fields"].items()}
    return float(value) if kind["kind"] == "float" else value


def arrow_type(kind: Kind):
    """The Arrow type of a kind."""
    import pyarrow as pa

    if kind["kind"] == "list":
        return pa.list_(arrow_type(kind["item"]))
    if kind["kind"] == "struct":
        fields = [(name, arrow_type(of)) for name, of in kind["fields"].items()]
        return pa.struct(fields) if fields else pa.struct([("empty", pa.null())])
    scalars = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
    # A column of nulls alone is a text without values: readers of several files agree on it.
    return scalars.get(kind["kind"], pa.string())


def table(rows: list[dict[str, Any]], kind: Kind):
    """An Arrow table of `rows`, whose kinds are all within `kind` (a struct)."""
    import pyarrow as pa

    schema = pa.schema([(name, arrow_type(of)) for name, of in kind["fields"].items()])
    return pa.Table.from_pylist([fitted(row, kind) for row in rows], schema=schema)
