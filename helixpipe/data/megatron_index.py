"""Megatron's index of tokens: `name.idx` says what `name.bin` holds.

It is MMIDIDX and two NULs, then little-endian: version uint64, dtype code uint8, sequences uint64, document marks uint64,
the sequences' lengths int32 and byte offsets int64, the document marks int64, and with images the sequences' modes int8.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from helixpipe.errors import DataError

_HEAD = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_DTYPES = ("", "uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")
_AT_A_TIME = 2**22


def index_of(tokens: Path) -> Path | None:
    """The index beside a .bin; None where it has none."""
    beside = (tokens.with_suffix(suffix) for suffix in (".idx", ".IDX"))
    return next((path for path in beside if os.path.lexists(path)), None)


class Index(NamedTuple):
    """`ends`: where each sequence ends, in tokens; `marks`: the sequence with which each document begins, and their count."""

    dtype: str
    ends: NDArray[np.int64]
    marks: NDArray[np.int64]


def paired(prefix: Path) -> Path | None:
    """The .bin of a pair that is named by its prefix; None where there is none."""
    try:
        if not prefix.name or os.path.lexists(prefix):
            return None
        beside = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".BIN"))
        return next((path for path in beside if path.is_file()), None)
    except (OSError, ValueError):  # a name that no file can have, or a folder that may not be looked into
        return None


def read_index(index: Path, tokens: Path, size_bytes: int) -> Index:
    """All of an index that belongs to a .bin of `size_bytes`; raises DataError where it does not."""
    dtype = indexed_dtype(index, tokens, size_bytes)
    try:
        with index.open("rb") as file:
            head = _HEAD.unpack(file.read(_HEAD.size))
            lengths, offsets = np.fromfile(file, "<i4", head[3]), np.fromfile(file, "<i8", head[3])
            marks = np.fromfile(file, "<i8", head[4])
    except OSError as error:
        raise DataError(f"data.path: '{index}' cannot be read: {error.strerror or error}") from None
    ends = np.cumsum(lengths, dtype=np.int64)
    if len(lengths) and not (offsets == (ends - lengths) * np.dtype(dtype).itemsize).all():
        _refuse(index, "has sequences that do not follow one another in its .bin")
    if not len(marks) or marks[0] != 0 or marks[-1] != len(lengths) or (np.diff(marks) < 0).any():
        _refuse(index, "has document marks that are not its sequences'")
    return Index(dtype, ends, marks)


def indexed_dtype(index: Path, tokens: Path, size_bytes: int) -> str:
    """The integer dtype of a .bin of `size_bytes`, by its index; raises DataError where the two do not go together."""
    try:
        if not index.is_file():  # a pipe would be waited for
            _refuse(index, "is a link to nowhere or not a file")
        with index.open("rb") as file:
            dtype, sequences = _read_head(index, file)
            count = _sum_lengths(index, file, sequences)
    except OSError as error:
        raise DataError(f"data.path: '{index}' cannot be read: {error.strerror or error}") from None
    expected_bytes = count * np.dtype(dtype).itemsize
    if expected_bytes != size_bytes:
        raise DataError(
            f"data.path: '{tokens}' has {size_bytes} bytes, and its index counts {count} tokens of {dtype}, "
            f"{expected_bytes} bytes; one of the two is cut short or another's"
        )
    return dtype


def _read_head(index: Path, file: BinaryIO) -> tuple[str, int]:
    """The dtype and the number of sequences; the file is then at their lengths."""
    head = file.read(_HEAD.size)
    if not head.startswith(_MAGIC):
        _refuse(index, "is not a Megatron index (MMIDIDX)")
    if len(head) < _HEAD.size:
        _refuse(index, f"is cut short: {len(head)} bytes")
    _, version, code, sequences, marks = _HEAD.unpack(head)
    if version != 1:
        _refuse(index, f"is a Megatron index of version {version}, and only 1 is known")
    if not 0 < code < len(_DTYPES):
        _refuse(index, f"has dtype code {code}, and only 1 to {len(_DTYPES) - 1} are known")
    if _DTYPES[code].startswith("float"):
        raise DataError(f"data.path: '{index}' says {_DTYPES[code]}, which are no tokens; give token ids")
    size, needed = os.fstat(file.fileno()).st_size, _HEAD.size + 12 * sequences + 8 * marks
    if size not in (needed, needed + sequences):
        _refuse(index, f"has {size} bytes, and its {sequences} sequences and {marks} document marks take {needed}")
    return _DTYPES[code], sequences


def _sum_lengths(index: Path, file: BinaryIO, sequences: int) -> int:
    """Tokens of all sequences."""
    count, left = 0, sequences
    while left:
        lengths = np.fromfile(file, "<i4", min(left, _AT_A_TIME))
        if not len(lengths) or lengths.min() < 0:
            _refuse(index, "has a sequence of negative length")
        count, left = count + int(lengths.sum(dtype=np.int64)), left - len(lengths)
    return count


def _refuse(index: Path, why: str) -> NoReturn:
    raise DataError(f"data.path: '{index}' {why}; write the index of its .bin anew, or take it away and set data.dtype")
