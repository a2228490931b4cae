"""In which precision a program multiplies, by scope; routers and the LM head in true fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pr2jax.core import hlo

# Innermost first: a product belongs to the first of these scopes that its name holds.
SCOPES = ("router", "lm_head", "attention", "moe", "ffn")
# Whose products must be in true fp32 (TPUs multiply fp32 in fewer bits unless told not to).
EXACT = ("router", "lm_head")


class PrecisionError(RuntimeError):
    """A product that decides routes or log-probs would be made in fewer bits than fp32."""


def asked_products(jaxpr: Any) -> list[hlo.Product]:
    """Every matrix product of a traced program, as our code asks for it."""
    return list(_products(jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr))


def _products(jaxpr: Any) -> Iterator[hlo.Product]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            asked = equation.params["precision"]
            levels = [str(getattr(p, "name", p)).lower() for p in asked or ("default",)]
            order = ("default", "high", "highest")
            level = min(levels, key=lambda p: order.index(p) if p in order else 0)
            types = tuple(_hlo_type(v.aval.dtype) for v in equation.invars[:2])
            yield hlo.Product(str(equation.source_info.name_stack), types, level)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _products(inner)


def _hlo_type(dtype: Any) -> str:
    name = str(dtype).replace("uint", "u").replace("int", "s")
    return name.replace("float", "f")


def scope_of(op_name: str) -> str:
    """Which of SCOPES a product belongs to, else "other"."""
    return next((s for s in SCOPES if hlo.scope_pattern(s).search(op_name)), "other")


def by_scope(products: Sequence[hlo.Product]) -> dict[str, dict[str, int]]:
    """scope -> {"f32 x f32 highest": how many}."""
    found: dict[str, dict[str, int]] = {}
    for product in products:
        kinds = found.setdefault(scope_of(product.op_name), {})
        key = f"{product.dtypes[0]} x {product.dtypes[1]} {product.precision}"
        kinds[key] = kinds.get(key, 0) + 1
    return {scope: dict(sorted(kinds.items())) for scope, kinds in sorted(found.items())}


def check_exact(
    name: str, products: Sequence[hlo.Product], types: Sequence[str] = ("f32",)
) -> None:
    """Raises PrecisionError where a product of EXACT scopes is not of `types` at HIGHEST.

    We ask for fp32; a compiler may leave a bfloat16 operand as it is, which is the same number.
    """
    for product in products:
        exact = set(product.dtypes) <= set(types) and product.precision == "highest"
        if scope_of(product.op_name) in EXACT and not exact:
            raise PrecisionError(
                f"{name}: {product.op_name} multiplies {' x '.join(product.dtypes)} at precision "
                f"{product.precision}, not fp32 at highest"
            )
