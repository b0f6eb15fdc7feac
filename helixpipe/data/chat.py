"""Chat templates: a conversation as text, and which letters of it the assistant wrote.

Templates are Jinja as transformers runs it: sandboxed, with `raise_exception`, `strftime_now`, `tojson` and the block
`{% generation %}`, which says what the assistant writes. Most templates lack it. Then a turn is what is added between the
rendering up to it, which asks for it, and the rendering with it; and where the one does not begin the other, refused.
"""

from __future__ import annotations

import json
from datetime import date
from typing import Any

from helixpipe.data.extras import needed
from helixpipe.errors import DataError

# halves of surrogate pairs, which no text has, mark where generation begins and ends
_OPEN, _CLOSE = "\udcfe", "\udcff"


class ChatTemplate:
    """A template and the tokenizer's special tokens, which it may name. `today` is the day that templates may write."""

    def __init__(self, text: str, special: dict[str, str], today: date) -> None:
        jinja2 = needed("jinja2", "--messages")
        self._fault = jinja2.TemplateError
        self._special = special
        environment = _environment(today)
        try:
            self._template = environment.from_string(text)
        except self._fault as error:
            raise DataError(f"--messages: the chat template is not Jinja that can be run: {error}") from None
        self._says_generation = "generation" in text and "endgeneration" in text

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the (begin, end) of what the assistant wrote.

        Raises ValueError for a conversation that the template refuses, DataError for a template with which it cannot be
        told what the assistant wrote.
        """
        try:
            json.dumps(messages, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("a message has a lone surrogate, which is no character") from None
        except RecursionError:
            raise ValueError("a message is too deeply nested") from None
        whole = self._run(messages)
        self._check_all_said(messages, whole)
        if self._says_generation:
            return _taken_out(whole)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = self._run(messages[:index], add_generation_prompt=True)
                after = self._run(messages[: index + 1])
            except ValueError as error:
                raise DataError(
                    f"{_UNTOLD} turn {index + 1} cannot be rendered without the turns after it: {error}"
                ) from None
            if not after.startswith(before):
                raise DataError(
                    f"{_UNTOLD} turn {index + 1} does not go on from what asks for it (add_generation_prompt)"
                )
            if not whole.startswith(after):
                raise DataError(f"{_UNTOLD} turn {index + 1} is rendered otherwise when turns follow it")
            spans.append((len(before), len(after)))
        return whole, spans

    def _check_all_said(self, messages: list[dict[str, Any]], whole: str) -> None:
        """Raise ValueError for a turn that the template leaves out, as many do where they do not know its role."""
        for index, message in enumerate(messages):
            if message["role"] in ("user", "assistant") or not message.get("content"):
                continue
            if self._is_the_same_without(messages, index, whole):
                raise ValueError(
                    f"the chat template leaves turn {index + 1} out, of role '{message['role']}'; rename its role, or remove it"
                )

    def _is_the_same_without(self, messages: list[dict[str, Any]], index: int, whole: str) -> bool:
        try:
            return self._run(messages[:index] + messages[index + 1 :]) == whole
        except ValueError:  # the others need it
            return False

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            text: str = self._template.render(**self._special, **given)
        except (self._fault, TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the chat template refuses it: {why}") from None
        return text


_UNTOLD = "--messages: with this chat template it cannot be told what the assistant wrote, since"


def _taken_out(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Text without the marks of generation, and where they were."""
    pieces, spans, length, begin = [], [], 0, 0
    for piece in _cut(text):
        if piece == _OPEN:
            begin = length
        elif piece == _CLOSE:
            spans.append((begin, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def _cut(text: str) -> list[str]:
    found: list[str] = []
    for piece in text.split(_OPEN):
        inside, *rest = piece.split(_CLOSE)
        found += [_OPEN, inside]
        for each in rest:
            found += [_CLOSE, each]
    return found[1:]


def _environment(today: date) -> Any:
    jinja2, sandbox = needed("jinja2", "--messages"), needed("jinja2.sandbox", "--messages")
    extension = needed("jinja2.ext", "--messages")

    base: Any = extension.Extension

    class Generation(base):  # type: ignore[misc]
        """`{% generation %}...{% endgeneration %}`: its text, marked."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extension.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = today.strftime
    return made
