"""Rendering of prompts and targets: our own `{field}` templates, and models' chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

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


def check_messages(messages: Sequence[Any]) -> None:
    """Raises ValueError if a message lacks a string `role` or `content`."""
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is not an object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"message {i} has no string {key!r}")


def render_messages(messages: list[dict[str, str]]) -> str:
    """Plain-text question of a chat: the contents in order, an empty line between them.

    Raises ValueError if a message lacks a string `role` or `content`.
    """
    check_messages(messages)
    parts = [message["content"].strip() for message in messages if message["content"].strip()]
    if not parts:
        raise ValueError("no message has any content")
    return "\n\n".join(parts)


class ChatTemplate:
    """A model's chat template (jinja2, as `transformers` defines it), run in a sandbox.

    specials: what the template may call by name: bos_token, eos_token, ... `strftime_now` is not
    given: a prompt must not depend on the day, and templates fall back to a fixed date.
    `where` names the template in messages. Raises ValueError where it is no template.
    """

    def __init__(self, source: str, specials: Mapping[str, str], where: str = "chat template"):
        import jinja2

        self.where, self._specials = where, dict(specials)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{where}: not a jinja2 template ({error})") from None

    def render(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text, up to where the assistant speaks next.

        Raises ValueError for a malformed message, or what the template refuses.
        """
        import jinja2

        check_messages(messages)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._specials,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self.where}: {error}") from None


def _environment():
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant said, for others; here it is its content."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own escapes what HTML cannot hold; a prompt is not HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.globals["raise_exception"] = refuse
    made.filters["tojson"] = tojson
    return made


class SpelledControls:
    """Keeps text that spells a control token apart from the control tokens of a template.

    `guard` puts a mark in the place of each spelling within a message; after rendering, `split`
    gives the pieces: (True, control token) or (False, text with its spellings put back).
    """

    def __init__(self, controls: Sequence[str], messages: Sequence[dict[str, str]]):
        longest_first = sorted(controls, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        texts = [message["content"] for message in messages]
        for message in messages:
            if self._pattern.search(message["role"]):
                raise ValueError(f"role {message['role']!r} spells a control token")
        self.any = any(self._pattern.search(text) for text in texts)
        # A private-use character that no message holds.
        self._mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in "".join(texts))
        self._spelled: list[str] = []

    def guard(self, text: str) -> str:
        """`text` with its spellings replaced."""

        def replace(match: re.Match) -> str:
            self._spelled.append(match[0])
            return f"{self._mark}{len(self._spelled) - 1}{self._mark}"

        return self._pattern.sub(replace, text)

    def split(self, rendered: str) -> list[tuple[bool, str]]:
        """Pieces of a rendered conversation, in order."""
        back = re.compile(f"{self._mark}(\\d+){self._mark}")
        restored = lambda text: back.sub(lambda m: self._spelled[int(m[1])], text)
        pieces, at = [], 0
        for match in self._pattern.finditer(rendered):
            pieces += [(False, restored(rendered[at : match.start()])), (True, match[0])]
            at = match.end()
        pieces.append((False, restored(rendered[at:])))
        return [piece for piece in pieces if piece[1]]
