"""Rendering of prompts and targets from templates."""

import re

_FIELD = re.compile(r"\{(\w+)\}")


def render(template: str, **fields: str) -> str:
    """Replaces each `{name}` of `template` that is a given field; every other brace stays.

    Unlike `str.format`, braces in the template that name no field (LaTeX, JSON) are text, and
    braces inside a field's value are never read again.
    """
    return _FIELD.sub(lambda m: fields.get(m.group(1), m.group(0)), template)


def render_prompt(template: str, question: str) -> str:
    """`template` with `{question}` filled in. Raises ValueError if it has no such field."""
    if "{question}" not in template:
        raise ValueError(f"prompt_template {template!r} has no {{question}}")
    return render(template, question=question)


def render_messages(messages: list[dict[str, str]]) -> str:
    """Plain-text question of a chat: the contents in order, an empty line between them.

    Raises ValueError if a message lacks a string `role` or `content`.
    """
    parts = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is not an object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"message {i} has no string {key!r}")
        if message["content"].strip():
            parts.append(message["content"].strip())
    if not parts:
        raise ValueError("no message has any content")
    return "\n\n".join(parts)
