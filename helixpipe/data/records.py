"""Documents of the inputs: units of work that positions in the inputs alone decide, and what is read of each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from helixpipe.data.inputs import MOST_DOCUMENT_BYTES, Input
from helixpipe.data.lines import Cut, Lines, decoded, whole
from helixpipe.data.options import Options
from helixpipe.data.tables import groups, rows
from helixpipe.errors import DataError

# so much of the inputs is a unit of work, and about so many units there are at most
UNIT_BYTES, MOST_UNITS = 2**22, 4096

Content = tuple[str, ...] | list[dict[str, Any]]
"""A document as it was read: its text, or prompt and completion, or a conversation."""


class Span(NamedTuple):
    """A part of an input: bytes [start, stop) of lines or text, or groups of rows [start, stop)."""

    source: Input
    start: int
    stop: int
    size_bytes: int
    first_row: int = 0


class Found(NamedTuple):
    """A document, or why there is none. `where` names the file and its line or row; `done_bytes` are those of the span."""

    content: Content | None
    done_bytes: int
    where: Callable[[], str]
    why: str = ""


def units(inputs: Sequence[Input], options: Options) -> list[tuple[Span, ...]]:
    """All of the inputs, in order; raises DataError for one that cannot be read as documents."""
    size = max(UNIT_BYTES, math.ceil(sum(each.size_bytes for each in inputs) / MOST_UNITS))
    made: list[tuple[Span, ...]] = []
    gathered: list[Span] = []
    gathered_bytes = 0
    for span in (span for source in inputs for span in _spans(source, size, options)):
        if gathered and gathered_bytes + span.size_bytes > size:
            made.append(tuple(gathered))
            gathered, gathered_bytes = [], 0
        gathered.append(span)
        gathered_bytes += span.size_bytes
    return [*made, tuple(gathered)] if gathered else made


def _spans(source: Input, size: int, options: Options) -> Iterator[Span]:
    if source.kind in ("parquet", "arrow"):
        for group in groups(source.path, source.kind, options.fields(), bool(options.messages)):
            yield Span(source, group.number, group.number + 1, group.size_bytes, group.first_row)
        return
    if source.kind == "text":
        if options.prompt or options.messages:
            asked = "--messages" if options.messages else "--prompt"
            raise DataError(
                f"'{source.path}' is plain text, which has no fields; give .jsonl or .parquet, or leave {asked} out"
            )
        if not options.split_lines and source.size_bytes > MOST_DOCUMENT_BYTES:
            raise DataError(
                f"'{source.path}' is one document of {source.size_bytes:,} bytes, more than the {MOST_DOCUMENT_BYTES:,} "
                "that one may have; give --split-lines if its lines are documents, or write its documents as .jsonl"
            )
    if source.packing or (source.kind == "text" and not options.split_lines):
        yield Span(source, 0, source.size_bytes, source.size_bytes)
        return
    for start in range(0, source.size_bytes, size):
        stop = min(start + size, source.size_bytes)
        yield Span(source, start, stop, stop - start)


def read(span: Span, options: Options) -> Iterator[Found]:
    """The documents of a span and the faults in it, in order."""
    path, kind = span.source.path, span.source.kind
    if kind in ("parquet", "arrow"):
        yield from _read_rows(span, options)
    elif kind == "text" and not options.split_lines:
        try:
            yield Found((whole(path),), span.size_bytes, lambda: path)
        except DataError as error:
            yield Found(None, span.size_bytes, lambda: path, str(error))
    else:
        lines = Lines(path, span.source.packing, span.start, span.stop)
        number = 0
        try:
            for number, line in lines:
                yield from _read_line(lines, number, line, options if kind == "lines" else None)
        except Cut as error:
            yield Found(
                None, span.size_bytes, partial(_line_of, lines, number + 1), f"the file {error} here; get it anew"
            )


def _read_line(lines: Lines, number: int, line: bytes | None, options: Options | None) -> Iterator[Found]:
    """What a line has: a record's fields, or text where there are no options. A line of blanks has no record."""
    where = partial(_line_of, lines, number)
    try:
        if line is None:
            raise DataError(f"is longer than the {MOST_DOCUMENT_BYTES:,} bytes that a document may have; divide it")
        if options is None:
            yield Found((decoded(line.removesuffix(b"\n").removesuffix(b"\r")),), lines.done_bytes, where)
        elif line.strip():
            yield Found(_content(_record(decoded(line)), options), lines.done_bytes, where)
    except DataError as error:
        yield Found(None, lines.done_bytes, where, str(error))


def _line_of(lines: Lines, number: int) -> str:
    return f"{lines.path}:{lines.line_number(number)}"


def _read_rows(span: Span, options: Options) -> Iterator[Found]:
    path, row = span.source.path, span.first_row
    try:
        for share, record in rows(path, span.source.kind, span.start, span.stop, options.fields()):
            row += 1
            done, where = int(share * span.size_bytes), partial("{}, row {}".format, path, row)
            try:
                yield Found(_content(record, options), done, where)
            except DataError as error:
                yield Found(None, done, where, str(error))
    except DataError as error:  # of the file
        yield Found(None, span.size_bytes, partial("{}, after row {}".format, path, row), str(error))


def _record(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"is not JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError):
        raise DataError("is not JSON that can be read: a number too long, or too deeply nested") from None
    if not isinstance(found, dict):
        raise DataError(f"is {_told(found)}, not an object with fields")
    return found


def _content(record: dict[str, Any], options: Options) -> Content:
    """The fields that are asked for; raises DataError where one is missing, or not what it must be."""
    for name in options.fields():
        if name not in record:
            known = ", ".join(f"'{each}'" for each in list(record)[:8]) or "none"
            raise DataError(f"has no field '{name}'; its fields: {known}; name it (see --text)")
    if options.messages:
        return _conversation(record[options.messages], options.messages)
    found = tuple(record[name] for name in options.fields())
    for name, value in zip(options.fields(), found, strict=True):
        if not isinstance(value, str):
            raise DataError(f"field '{name}' is {_told(value)}, not text")
        if len(value) > MOST_DOCUMENT_BYTES:
            raise DataError(f"field '{name}' has {len(value):,} characters, more than a document may have; divide it")
        _check_unicode(name, value)
    return found


def _check_unicode(name: str, text: str) -> None:
    """Raise DataError for half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"field '{name}' has a lone surrogate (\\u{ord(text[error.start]):04x}) at {error.start + 1}"
        ) from None


def _conversation(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"field '{name}' is {_told(value)}, not a list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"field '{name}' has a message without a role: {_told(message)}")
    return [_without_nulls(message) for message in value]


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """Tables fill fields that a message lacks with null, and templates write it out as None."""
    return {key: value for key, value in message.items() if value is not None}


def _told(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"a number ({str(value)[:20]})"
    if isinstance(value, str):
        return "text"
    return ("an empty " if not value else "a ") + ("list" if isinstance(value, list) else "object")
