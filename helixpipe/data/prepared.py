"""Prepared data, read: documents as tokens, memory-mapped; and Megatron's pairs by the same questions."""

from __future__ import annotations

import bisect
import itertools
import json
import os
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from helixpipe.data.inputs import MANIFEST
from helixpipe.data.journal import FORMAT, JOURNAL, VERSION, digest
from helixpipe.data.megatron_index import Index, index_of, paired, read_index
from helixpipe.errors import DataError


class Documents(Protocol):
    """Documents in order. `mask` says which tokens count as targets."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [documents]."""

    def tokens(self, document: int) -> NDArray[Any]:
        """The tokens of a document, [its length]."""

    def mask(self, document: int) -> NDArray[np.bool_]:
        """Which of them count as targets, bool [its length]."""


class Shard:
    """One shard of a prepared folder: `first` is the number of its first document."""

    def __init__(self, folder: Path, table: dict[str, Any], dtype: str, first: int) -> None:
        self.name, self.documents, self.token_count = table["name"], table["documents"], table["tokens"]
        self.masked, self.first = table["counted"] < table["tokens"], first
        self.path = folder / f"{self.name}.tokens"
        self.mask_path = folder / f"{self.name}.mask"
        self.tokens = _mapped(self.path, dtype, self.token_count)
        self.begins = _mapped(folder / f"{self.name}.documents", "uint64", self.documents + 1)
        self.bits = _mapped(self.mask_path, "uint8", -(-self.token_count // 8)) if self.masked else None
        if int(self.begins[0]) != 0 or int(self.begins[-1]) != self.token_count:
            _refuse(folder, f"{self.name}.documents does not end where its tokens do")

    def range_of(self, document: int) -> tuple[int, int]:
        """Where a document of the shard begins and ends in its tokens."""
        return int(self.begins[document]), int(self.begins[document + 1])


class Prepared:
    """A folder that `helixpipe prepare` wrote. `manifest` is all that it says of itself."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.dtype: str = manifest["dtype"]
        firsts = itertools.accumulate((each["documents"] for each in manifest["shards"]), initial=0)
        self.shards = [
            Shard(folder, table, self.dtype, first) for table, first in zip(manifest["shards"], firsts, strict=False)
        ]
        self._ends = [shard.first + shard.documents for shard in self.shards]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Prepared:
        """Read a folder's manifest and map its files; raises DataError where they are not whole or not of one another."""
        path = Path(folder)
        manifest = _manifest(path)
        try:
            return cls(path, manifest)
        except (KeyError, TypeError, ValueError):  # of a manifest whose digest was made to fit
            _refuse(path, f"its {MANIFEST} lacks something")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.concatenate(
            [np.diff(shard.begins.astype(np.int64)) for shard in self.shards] or [np.zeros(0, np.int64)]
        )

    def tokens(self, document: int) -> NDArray[Any]:
        shard, (begin, end) = self._find(document)
        return shard.tokens[begin:end]

    def mask(self, document: int) -> NDArray[np.bool_]:
        shard, (begin, end) = self._find(document)
        return np.ones(end - begin, bool) if shard.bits is None else unpacked(shard.bits, begin, end - begin)

    def _find(self, document: int) -> tuple[Shard, tuple[int, int]]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        shard = self.shards[bisect.bisect_right(self._ends, document)]
        return shard, shard.range_of(document - shard.first)


def unpacked(bits: NDArray[np.uint8], start: int, count: int) -> NDArray[np.bool_]:
    """`count` bits from `start` on."""
    held = np.unpackbits(bits[start // 8 : -(-(start + count) // 8)], bitorder="little")
    return held[start % 8 : start % 8 + count].astype(bool)


class Megatron:
    """A pair of Megatron's. A document is what its index marks as one: a sequence or several."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.dtype = path, index.dtype
        self._tokens = _mapped(path, index.dtype, int(index.ends[-1]) if len(index.ends) else 0)
        ends = np.concatenate([[0], index.ends])
        self._begins = ends[index.marks]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Megatron:
        """By the .bin or by the prefix that it shares with its .idx; raises DataError."""
        tokens = paired(Path(path)) or Path(path)
        index = index_of(tokens)
        if index is None:
            raise DataError(f"data.path: '{tokens}' has no .idx beside it; documents of a .bin are known by its index")
        try:
            size_bytes = tokens.stat().st_size
        except OSError as error:
            raise DataError(f"data.path: '{tokens}' cannot be read: {error.strerror}") from None
        return cls(tokens, read_index(index, tokens, size_bytes))

    def __len__(self) -> int:
        return len(self._begins) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self._begins)

    def tokens(self, document: int) -> NDArray[Any]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self._tokens[self._begins[document] : self._begins[document + 1]]

    def mask(self, document: int) -> NDArray[np.bool_]:
        return np.ones(len(self.tokens(document)), bool)


def open_documents(path: str | os.PathLike[str]) -> Documents:
    """A prepared folder, or a pair of Megatron's by its .bin or prefix; raises DataError."""
    return Prepared.open(path) if Path(path).is_dir() else Megatron.open(path)


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        if (folder / JOURNAL).exists():
            _refuse(folder, "its preparation has not ended; give the same helixpipe prepare again, which goes on")
        raise DataError(f"data.path: '{folder}' has no {MANIFEST}; it is not what helixpipe prepare writes")
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        name, version, known = found["format"], found["version"], found["digest"]
    except OSError as error:
        _refuse(folder, f"its {MANIFEST} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError, RecursionError):
        _refuse(folder, f"its {MANIFEST} is not one of helixpipe prepare")
    if name != FORMAT or version != VERSION:
        _refuse(folder, f"its {MANIFEST} is of version {version}, and only {VERSION} is known; prepare it anew")
    if digest(found) != known:
        _refuse(folder, f"its {MANIFEST} was changed; prepare it anew")
    return dict(found)


def _mapped(path: Path, dtype: str, count: int) -> NDArray[Any]:
    """A file of so many numbers as an array; raises DataError where it has another size."""
    needed = count * np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
        if size != needed:
            raise DataError(f"data.path: '{path}' has {size:,} bytes, and {needed:,} are known of; prepare it anew")
        return np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)
    except OSError as error:
        raise DataError(
            f"data.path: '{path}' cannot be read: {(error.strerror or str(error)).lower()}; prepare it anew"
        ) from None


def _refuse(folder: Path, why: str) -> NoReturn:
    raise DataError(f"data.path: '{folder}' cannot be read as prepared: {why}")
