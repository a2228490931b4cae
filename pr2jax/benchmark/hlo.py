"""Whether a program does any work for the predictor, read from its own text."""

from __future__ import annotations

import re
from typing import Any

PREDICTOR_FUNCTIONS = ("predictor_loss", "margin_weights")


def predictor_calls(lowered: Any) -> int:
    """How often a lowered program's operations say that they come from the predictor's code."""
    text = lowered.as_text(debug_info=True)
    return sum(len(re.findall(rf"\b{name}\b", text)) for name in PREDICTOR_FUNCTIONS)


def predictor_users(compiled_text: str) -> list[str]:
    """Instructions of the compiled program that read W_p, its moments or its gate, other than
    the tuple that the program returns: so none where all of them only pass through.

    Raises ValueError where the program has no such parameter.
    """
    entry = compiled_text[compiled_text.index("\nENTRY ") :]
    names, others = [], []
    for line in entry.splitlines()[1:]:
        head, equals, rest = line.partition(" = ")
        if not equals:
            continue
        told = re.search(r'op_name="([^"]*)"', rest)
        name = head.strip().removeprefix("ROOT ").lstrip("%")
        if re.search(r"\bparameter\(\d+\)", rest):
            if told and "predictor" in told[1]:
                names.append(name)
        elif not (head.strip().startswith("ROOT ") and re.search(r"\)\s+tuple\(", rest)):
            others.append((name, rest.partition(", metadata=")[0]))
    if not names:
        raise ValueError("no parameter of the program is the predictor's")
    reads = re.compile(r"(?<![\w.\-])(?:" + "|".join(map(re.escape, names)) + r")(?![\w.\-])")
    return [name for name, operands in others if reads.search(operands)]
