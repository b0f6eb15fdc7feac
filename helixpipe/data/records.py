"""Documents of the inputs: units of work that positions in the inputs alone decide, and what is read of each."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from helixpipe.data.inputs import MOST_DOCUMENT_BYTES, Input
from helixpipe.data.lines import Cut, Lines, decoded, whole
from helixpipe.data.options import Options
from helixpipe.data.tables import groups, rows
from helixpipe.errors import DataError

# so much of the inputs is a unit of work; less of small inputs, so that workers end together, and more of huge ones
UNIT_BYTES, LEAST_UNIT_BYTES = 2**22, 2**20
_FEW_UNITS, MOST_UNITS = 64, 4096

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
    """A document, or why there is none. `number`: its line within the span, or its row in the file; `done_bytes` of the span's."""

    content: Content | None
    number: int
    done_bytes: int
    why: str = ""


def units(inputs: Sequence[Input], options: Options) -> list[tuple[Span, ...]]:
    """All of the inputs, in order; raises DataError for one that cannot be read as documents."""
    total = sum(each.size_bytes for each in inputs)
    size = max(min(UNIT_BYTES, max(LEAST_UNIT_BYTES, total // _FEW_UNITS)), math.ceil(total / MOST_UNITS))
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


def lines_of(span: Span, options: Options) -> Lines | None:
    """The lines of a span that is read by lines; None for any other."""
    kind = span.source.kind
    if kind == "lines" or (kind == "text" and options.split_lines):
        return Lines(span.source.path, span.source.packing, span.start, span.stop)
    return None


def place(span: Span, number: int) -> str:
    """Where a document is, for people: `number` is its line or row in the file."""
    path, kind = span.source.path, span.source.kind
    if kind in ("parquet", "arrow"):
        return f"{path}, row {number}"
    return f"{path}:{number}" if number else path


def read(span: Span, options: Options, lines: Lines | None) -> Iterator[Found]:
    """The documents of a span and the faults in it, in order. `lines` is `lines_of` it."""
    if span.source.kind in ("parquet", "arrow"):
        yield from _read_rows(span, options)
    elif lines is None:
        try:
            yield Found((whole(span.source.path),), 0, span.size_bytes)
        except DataError as error:
            yield Found(None, 0, span.size_bytes, str(error))
    else:
        try:
            for number, line in lines:
                yield from _read_line(number, line, lines.done_bytes, options if span.source.kind == "lines" else None)
        except Cut as error:
            yield Found(None, lines.count + 1, span.size_bytes, f"the file {error} here; get it anew")


def _read_line(number: int, line: bytes | None, done: int, options: Options | None) -> Iterator[Found]:
    """What a line has: a record's fields, or text where there are no options. A line of blanks has no record."""
    try:
        if line is None:
            raise DataError(f"is longer than the {MOST_DOCUMENT_BYTES:,} bytes that a document may have; divide it")
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        if options is None:
            yield Found((decoded(text),), number, done)
        elif text.strip():
            yield Found(_content(_record(decoded(text)), options), number, done)
    except DataError as error:
        yield Found(None, number, done, str(error))


def _read_rows(span: Span, options: Options) -> Iterator[Found]:
    path, row, done = span.source.path, span.first_row, 0
    try:
        for share, record in rows(path, span.source.kind, span.start, span.stop, options.fields()):
            row, done = row + 1, int(share * span.size_bytes)
            try:
                yield Found(_content(record, options), row, done)
            except DataError as error:
                yield Found(None, row, done, str(error))
    except DataError as error:  # of the file
        yield Found(None, row + 1, done, str(error))


class _Repeated(dict[str, Any]):
    """An object with names that stand more than once, of which JSON's readers keep the last. `names`: these."""

    names: set[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _Repeated(found)
    repeated.names = {name for name, count in Counter(name for name, _ in pairs).items() if count > 1}
    return repeated


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def _record(text: str) -> dict[str, Any]:
    try:
        found = _decode(text)
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
        if isinstance(record, _Repeated) and name in record.names:
            raise DataError(f"has the field '{name}' more than once; leave one of them")
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
        if isinstance(message, _Repeated):
            raise DataError(
                f"field '{name}' has a message with '{min(message.names)}' more than once; leave one of them"
            )
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
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object" if value else "an empty object"
