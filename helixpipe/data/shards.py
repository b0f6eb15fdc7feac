"""Shards: the documents of a unit of work on disk, and what is counted of them.

A shard is `NAME.tokens` (uint16 or uint32), `NAME.documents` (uint64: where each document begins, and the end of the last)
and, where any target is masked, `NAME.mask` (a bit a token, the lowest first; 1 counts).
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixpipe.data.lines import Lines
from helixpipe.data.options import Options
from helixpipe.data.records import Found, Span, lines_of, place, read
from helixpipe.data.tokenizer import Encoded, Tokenizer
from helixpipe.errors import DataError, HelixpipeError

# a shard is closed when it has so many tokens
SHARD_TOKENS = 2**24
# documents go to the tokenizer so many letters, and so many, at a time
_BATCH_LETTERS, _BATCH = 2**19, 512
# so many faults are named one by one
MOST_NAMED = 20
TEMPORARY = ".part"


@dataclass
class Shard:
    """A shard that is written."""

    name: str
    documents: int
    tokens: int
    counted: int


@dataclass
class Done:
    """What came of a unit of work. `lengths`: documents by the power of two that their length has reached."""

    unit: int
    shards: list[Shard] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)
    largest: int = -1
    bad: int = 0
    lines: list[int] = field(default_factory=list)
    """Of each span, how many lines it has."""
    named: list[tuple[int, int, str]] = field(default_factory=list)
    """The first that are bad: the span, the line in it or the row, and why."""
    short: int = 0
    long: int = 0

    def table(self) -> dict[str, Any]:
        return asdict(self) | {"lengths": {str(power): count for power, count in sorted(self.lengths.items())}}


def from_table(table: dict[str, Any]) -> Done:
    """`Done.table` read back."""
    lengths = Counter({int(power): count for power, count in table["lengths"].items()})
    return Done(
        **table
        | {"lengths": lengths, "shards": [Shard(**each) for each in table["shards"]]}
        | {"named": [tuple(each) for each in table["named"]]}
    )


class WriteError(HelixpipeError):
    """The output cannot be written; what is there stays good."""


@dataclass(frozen=True)
class Setting:
    """What every worker is told once."""

    folder: str
    dtype: str
    options: Options
    stop_at_bad: bool


def prepare_unit(
    unit: int, spans: tuple[Span, ...], tokenizer: Tokenizer, setting: Setting, tell: Callable[[int, int], None]
) -> Done:
    """Write the shards of a unit. `tell(bytes, tokens)` hears what was done since it was last told.

    Raises DataError for a document that is bad, if that stops; WriteError.
    """
    done = Done(unit)
    writer = _Writer(done, setting)
    for span in spans:
        lines = lines_of(span, setting.options)
        told, gathered, letters = 0, list[Found](), 0
        for found in read(span, setting.options, lines):
            gathered.append(found)
            letters += _letters(found)
            if letters >= _BATCH_LETTERS or len(gathered) >= _BATCH:
                tokens = _write(span, lines, gathered, tokenizer, setting, writer)
                tell(found.done_bytes - told, tokens)
                told, gathered, letters = found.done_bytes, [], 0
        tell(span.size_bytes - told, _write(span, lines, gathered, tokenizer, setting, writer))
        done.lines.append(lines.count if lines else 0)
    writer.close()
    return done


def _letters(found: Found) -> int:
    return (
        1000 if found.content is None else sum(len(each) if isinstance(each, str) else 1000 for each in found.content)
    )


def _write(
    span: Span, lines: Lines | None, gathered: list[Found], tokenizer: Tokenizer, setting: Setting, writer: _Writer
) -> int:
    """Tokenise and write documents; how many tokens they have."""
    done, options = writer.done, setting.options
    encoded = iter(tokenizer.encode([found.content for found in gathered if found.content is not None]))
    tokens = 0
    for found in gathered:
        result = found.why if found.content is None else next(encoded)
        if isinstance(result, str):
            if setting.stop_at_bad:
                number = found.number + (lines.before() if lines else 0)
                raise DataError(f"{place(span, number)}: {result} (--on-error skip leaves such out)")
            done.bad += 1
            if len(done.named) < MOST_NAMED:
                done.named.append((len(done.lines), found.number, result))
        elif result.own < options.min_tokens or not len(result.ids):
            done.short += 1
        elif options.max_tokens is not None and result.own > options.max_tokens:
            done.long += 1
        else:
            writer.add(result)
            tokens += len(result.ids)
    return tokens


class _Writer:
    """Shards of one unit, one after another. They bear their names when they are whole."""

    def __init__(self, done: Done, setting: Setting) -> None:
        self.done, self._folder, self._dtype = done, Path(setting.folder), np.dtype(setting.dtype)
        self._ids: list[NDArray[Any]] = []
        self._counted: list[NDArray[np.bool_] | int] = []
        self._lengths: list[int] = []
        self._tokens = 0

    def add(self, document: Encoded) -> None:
        count = len(document.ids)
        if self._tokens and self._tokens + count > SHARD_TOKENS:
            self.close()
        self._ids.append(document.ids.astype(self._dtype))
        self._counted.append(count if document.counted is None else document.counted)
        self._lengths.append(count)
        self._tokens += count
        self.done.lengths[count.bit_length() - 1] += 1
        self.done.largest = max(self.done.largest, int(document.ids.max()))

    def close(self) -> None:
        if not self._lengths:
            return
        name = f"{self.done.unit:05d}-{len(self.done.shards):03d}"
        counted = np.concatenate([np.ones(each, bool) if isinstance(each, int) else each for each in self._counted])
        self._save(name + ".tokens", np.concatenate(self._ids))
        self._save(name + ".documents", np.cumsum([0, *self._lengths], dtype=np.uint64))
        if not counted.all():
            self._save(name + ".mask", np.packbits(counted, bitorder="little"))
        self.done.shards.append(Shard(name, len(self._lengths), self._tokens, int(counted.sum())))
        self._ids, self._counted, self._lengths, self._tokens = [], [], [], 0

    def _save(self, name: str, array: NDArray[Any]) -> None:
        save(self._folder / name, array.data.cast("B"))


def save(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all. Raises WriteError."""
    beside = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path.parent, error) from None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cannot_write(folder: Path, error: OSError) -> WriteError:
    why = f"--output: '{folder}' cannot be written: {(error.strerror or str(error)).lower()}; "
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return WriteError(why + "give a folder that you may write to")
    todo = "make room" if error.errno in _FULL else "mend this"
    return WriteError(why + f"{todo} and give the same command again: it goes on from what is written")
