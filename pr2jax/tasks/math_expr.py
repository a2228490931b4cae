"""Equality of two mathematical expressions, read by `math-verify`'s parser, compared by value.

Numbers are compared to 40 digits (to 1e-6 where one was written as a decimal), expressions at
random points: that is faster than simplifying a difference and, unlike string or structural
matching, wrong with a probability that can be neglected. What cannot be evaluated so is left to
`math-verify`'s own comparison. Values whose size alone would fill the memory are refused first.
"""

import functools
import math
import random
import threading
from typing import Any

REL_TOL, ABS_TOL = 1e-6, 1e-4  # of numbers one of which is a decimal: both must hold
_DIGITS = 60
_EXACT = 40  # digits to which exact values must agree
_SIZE = 3000.0  # log10 of the largest intermediate value
_NODES = 400
_TIMEOUT_S = 4
_POINTS = 6


class TooLarge(ValueError):
    """An expression that is not evaluated for its size."""


@functools.lru_cache(maxsize=512)  # a reference is compared with many answers
def read(text: str) -> Any:
    """The sympy expression of a clean LaTeX text, None where it is none.

    Raises TooLarge, and RuntimeError outside of a process's main thread, where time cannot be
    limited.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math answers are read in a main thread only: use a VerifierPool")
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify.utils import timeout

    # Unlike math-verify's own call: case is kept, and no letter is taken for a unit and dropped.
    normalise = NormalizationConfig(basic_latex=True, malformed_operators=True, boxed="none")
    convert = ConversionConfig(lowercase_symbols=False)
    try:
        found = timeout(timeout_seconds=_TIMEOUT_S)(latex2sympy)(
            text, normalization_config=normalise, conversion_config=convert
        )
    except Exception:  # its parser raises bare Exceptions
        return None
    if not isinstance(found, sympy.Basic | sympy.MatrixBase):
        return None
    check_size(found)
    return found.subs(sympy.Symbol("i"), sympy.I) if isinstance(found, sympy.Expr) else found


def check_size(expr: Any) -> None:
    """Raises TooLarge for towers of powers, factorials of large numbers, and very long sums."""
    import sympy

    for count, node in enumerate(sympy.preorder_traversal(expr)):
        if count >= _NODES:
            raise TooLarge("more than 400 terms")
        if getattr(node, "is_number", False) and _log10(node) > _SIZE:
            raise TooLarge("a number of more than 3000 digits")


def _log10(node: Any) -> float:
    """An upper bound of log10 |node| for numbers, inf where there is none."""
    import sympy

    if node.is_Rational:
        if max(node.p.bit_length(), node.q.bit_length()) > 2**15:
            return math.inf
        return max(math.log10(abs(node.p) + 1), math.log10(node.q))
    if not node.args:
        return 300.0 if node.is_Float else 1.0
    sizes = [_log10(arg) for arg in node.args]
    if isinstance(node, sympy.Add):
        return max(sizes) + math.log10(len(sizes))
    if isinstance(node, sympy.Mul):
        return sum(sizes)
    if isinstance(node, sympy.Pow):
        exponent = _magnitude(node.exp)
        # Both a power and its inverse need as many digits.
        return (sizes[0] + 1) * exponent
    if isinstance(node, sympy.factorial | sympy.gamma):
        n = _magnitude(node.args[0])
        return n * max(math.log10(n + 1), 1.0)
    if isinstance(node, sympy.exp):
        return _magnitude(node.args[0])
    if isinstance(node, sympy.binomial):
        return _magnitude(node.args[0])
    return max(sizes)


def _magnitude(node: Any) -> float:
    """An upper bound of |node|."""
    if node.is_Integer:
        return float(abs(node.p)) if node.p.bit_length() < 64 else math.inf
    size = _log10(node)
    return 10.0**size if size < 15 else math.inf


def same(a: Any, b: Any) -> bool:
    """Whether two expressions are equal. Raises math-verify's TimeoutException after 4 s."""
    from math_verify.utils import timeout

    return timeout(timeout_seconds=_TIMEOUT_S)(_same)(a, b)


def _same(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if getattr(a, "free_symbols", None) or getattr(b, "free_symbols", None):
        verdict = _same_function(a, b)
    else:
        verdict = _same_number(a, b)
    return _by_library(a, b) if verdict is None else verdict


def has_decimal(expr: Any) -> bool:
    """Whether a decimal was written in it."""
    import sympy

    return expr.has(sympy.Float)


def _number(expr: Any, digits: int = _DIGITS) -> Any:
    """expr as a finite mpmath number; None where it has none."""
    import sympy

    try:
        value = sympy.N(expr.doit(), digits)
    except (TypeError, ValueError, AttributeError, ArithmeticError, NotImplementedError):
        return None
    parts = value.as_real_imag() if isinstance(value, sympy.Expr) else (None, None)
    if not all(isinstance(p, sympy.Float | sympy.Integer | sympy.Rational) for p in parts):
        return None
    return value


def _same_number(a: Any, b: Any) -> bool | None:
    first, second = _number(a), _number(b)
    if first is None or second is None:
        return None
    return _close(first, second, has_decimal(a) or has_decimal(b))


def _close(first: Any, second: Any, decimal: bool) -> bool:
    import sympy

    gap = abs(sympy.N(first - second, _DIGITS))
    scale = abs(sympy.N(first, _DIGITS))
    if decimal:
        return bool(gap <= REL_TOL * scale) and bool(gap <= ABS_TOL)
    return bool(gap <= sympy.Float(10) ** -_EXACT * max(scale, abs(second), sympy.Integer(1)))


def _same_function(a: Any, b: Any) -> bool | None:
    """By values at random points: positive ones, then of both signs; None where undecided."""
    import sympy

    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return None
    if a.has(sympy.core.function.AppliedUndef) or b.has(sympy.core.function.AppliedUndef):
        return None
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    decimal = has_decimal(a) or has_decimal(b)
    rng = random.Random(20240607)
    agreed = 0
    for signs in ("+",) * _POINTS + ("-",) * _POINTS:
        point = {}
        for name in names:
            size = sympy.Rational(rng.randint(3000, 29999), 10007)
            point[name] = -size if signs == "-" and rng.random() < 0.7 else size
        first, second = _number(a.subs(point)), _number(b.subs(point))
        if first is None or second is None:
            continue
        if _close(first, second, decimal):
            agreed += 1
        elif signs == "+" or (_in_domain(a, point) and _in_domain(b, point)):
            return False
    return True if agreed >= _POINTS // 2 else None


def _in_domain(expr: Any, point: dict) -> bool:
    """Whether no root or logarithm is taken of a negative number at `point`."""
    import sympy

    for node in sympy.preorder_traversal(expr):
        if isinstance(node, sympy.Pow) and not node.exp.is_Integer:
            inner = node.base
        elif isinstance(node, sympy.log):
            inner = node.args[0]
        else:
            continue
        value = _number(inner.subs(point))
        if value is None or not value.is_real or value < 0:
            return False
    return True


def _by_library(a: Any, b: Any) -> bool:
    """math-verify's own comparison."""
    from math_verify import verify

    return bool(verify([a], [b], timeout_seconds=_TIMEOUT_S, allow_set_relation_comp=True))


def proportion(a: Any, b: Any) -> int:
    """The sign of c where a = c b with a constant c other than 0; else 0."""
    import sympy

    names = sorted(a.free_symbols | b.free_symbols, key=str)
    if a.free_symbols != b.free_symbols:
        return 0
    rng = random.Random(20240608)
    ratios = []
    for _ in range(_POINTS):
        point = {n: sympy.Rational(rng.randint(-29999, 29999), 10007) for n in names}
        first, second = _number(a.subs(point)), _number(b.subs(point))
        if first is None or second is None or first == 0 or second == 0:
            continue
        ratios.append(sympy.N(first / second, _DIGITS))
    if len(ratios) < 3 or not all(ratio.is_real for ratio in ratios):
        return 0
    decimal = has_decimal(a) or has_decimal(b)
    if not all(_close(ratios[0], ratio, decimal) for ratio in ratios[1:]):
        return 0
    return 1 if ratios[0] > 0 else -1
