"""Data: tokens in files, cut into training and held-out, and batches of them.

Nothing is held in memory and nothing is remembered: a batch is a function of the seed and the step, read from
the files when it is asked for. So a resumed run needs no state of a loader.
"""

from __future__ import annotations

import bisect
import itertools
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from helixpipe.config import Config, DataConfig
from helixpipe.errors import DataError
from helixpipe.files import fault

# not what people write as a program: tests, vendored packages, and tables
_STDLIB_SKIPPED = frozenset({
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo",
    "ensurepip", "encodings", "pydoc_data",
})  # fmt: skip
_TOKEN_FILES = (".npy", ".bin")
# so many windows of so many tokens are what data is known by
_SAMPLES, _SAMPLE_TOKENS = 16, 256
# token files are searched for ids beyond the vocabulary so far before a run, and batch by batch in it
_CHECKED_TOKENS = 2**24


class Piece(NamedTuple):
    """A run of tokens in one file."""

    path: str
    dtype: str
    offset_bytes: int
    tokens: int


class Batch(NamedTuple):
    """int64 [sequences, sequence_length] each; `targets` are the tokens that come next."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]


class Tokens:
    """Pieces read as one long run."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self._ends = list(itertools.accumulate(piece.tokens for piece in self.pieces))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """`count` tokens from `start` on, across files; raises DataError when a file has become shorter."""
        found = []
        for index in range(bisect.bisect_right(self._ends, start), len(self.pieces)):
            piece = self.pieces[index]
            skipped = start - (self._ends[index] - piece.tokens)
            taken = min(count, piece.tokens - skipped)
            found.append(_read_piece(piece, skipped, taken))
            start, count = start + taken, count - taken
            if not count:
                break
        return np.concatenate(found)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out tokens, and the batches of a run."""

    training: Tokens
    held_out: Tokens
    sequence_length: int
    batch_size: int
    vocabulary: int
    seed: int

    def fingerprint(self) -> tuple[int, int, int]:
        """Tokens to train on, tokens held out, and a checksum of windows all over the former: what data this is."""
        count = min(len(self.training), _SAMPLE_TOKENS)
        room = len(self.training) - count
        windows = [self.training.read(room * i // (_SAMPLES - 1), count) for i in range(_SAMPLES)]
        return len(self.training), len(self.held_out), zlib.crc32(np.stack(windows).tobytes())

    def batch(self, step: int) -> Batch:
        """The batch of a training step: windows from anywhere, decided by seed and step alone."""
        draw = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        starts = draw.integers(0, len(self.training) - self.sequence_length, size=self.batch_size)
        return self._windows(self.training, starts.tolist())

    def evaluation(self, batches: int) -> Iterator[Batch]:
        """The same windows of held-out tokens every time, evenly spread."""
        room = len(self.held_out) - self.sequence_length - 1
        count = batches * self.batch_size
        starts = [room * i // max(count - 1, 1) for i in range(count)]
        for first in range(0, count, self.batch_size):
            yield self._windows(self.held_out, starts[first : first + self.batch_size])

    def _windows(self, tokens: Tokens, starts: Sequence[int]) -> Batch:
        windows = np.stack([tokens.read(start, self.sequence_length + 1) for start in starts])
        if windows.max() >= self.vocabulary:
            raise DataError(
                f"data.path: token {windows.max()} does not fit a vocabulary of {self.vocabulary}; "
                "raise model.vocabulary or prepare the data with its tokenizer"
            )
        return Batch(windows[:, :-1], windows[:, 1:])


def open_corpus(config: Config) -> Corpus:
    """The corpus of a config; raises DataError for data that cannot be trained on."""
    length, vocabulary = config.train.sequence_length, config.shape().vocabulary
    pieces = _pieces(config.data)
    named = f"data.path: '{config.data.path}'" if config.data.path else "data.path: the Python standard library"
    if not sum(piece.tokens for piece in pieces):
        raise DataError(f"{named} is empty; give a file or folder with text or tokens")
    _check_vocabulary(pieces, vocabulary)
    training, held_out = _split(pieces, config.data.held_out)
    if len(training) < length + 1:
        raise DataError(
            f"{named} has {len(training)} tokens to train on, fewer than a sequence and its next token "
            f"({length + 1}); shorten train.sequence_length or give more data"
        )
    if config.data.held_out and len(held_out) < length + 1:
        raise DataError(
            f"{named} leaves {len(held_out)} tokens held out, fewer than a sequence and its next token "
            f"({length + 1}); raise data.held_out, set it to 0, or give more data"
        )
    return Corpus(training, held_out, length, config.batch_size, vocabulary, config.train.seed)


def _pieces(config: DataConfig) -> list[Piece]:
    """Every file as a piece, in an order that is the same on every machine."""
    if not config.path:
        library = Path(sysconfig.get_paths()["stdlib"])
        return [_text(path) for path in _walk(library, _STDLIB_SKIPPED) if path.suffix == ".py"]
    path = Path(config.path)
    if why := fault(path):
        raise DataError(f"data.path: '{path}' cannot be read: {why}")
    if path.is_dir():
        files = list(_walk(path))
        tokens = [file for file in files if file.suffix in _TOKEN_FILES]
        if tokens and len(tokens) < len(files):
            other = next(file for file in files if file.suffix not in _TOKEN_FILES)
            raise DataError(f"data.path: '{path}' mixes tokens ('{tokens[0]}') and text ('{other}'); separate them")
        return [_piece(file, config) for file in files]
    if not path.exists():
        raise DataError(f"data.path: '{path}' does not exist; give a text file, a folder of them, or .npy/.bin tokens")
    if not path.is_file():
        raise DataError(f"data.path: '{path}' is neither a file nor a folder")
    return [_piece(path, config)]


def _walk(folder: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The files below a folder, sorted; hidden ones are left out."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"data.path: '{error.filename}' cannot be read: {error.strerror}") from None

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        paths = (Path(parent, name) for name in sorted(files) if not name.startswith("."))
        for path in paths:
            try:
                is_file = path.is_file()  # a link to nowhere or a pipe is not
            except OSError as error:
                refuse(error)
            if is_file:
                yield path


def _piece(path: Path, config: DataConfig) -> Piece:
    if path.suffix == ".npy":
        return _numpy(path)
    if path.suffix == ".bin":
        size, width = _size(path), np.dtype(config.dtype).itemsize
        if size % width:
            raise DataError(
                f"data.path: '{path}' has {size} bytes, not a multiple of {config.dtype}'s {width}; "
                "set data.dtype to what it holds"
            )
        return Piece(str(path), config.dtype, 0, size // width)
    return _text(path)


def _text(path: Path) -> Piece:
    return Piece(str(path), "uint8", 0, _size(path))


def _numpy(path: Path) -> Piece:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"data.path: '{path}' cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError):  # a wrong magic, a header of objects, fewer bytes than the header says
        raise DataError(f"data.path: '{path}' is not a whole .npy array of numbers; write it with numpy.save") from None
    if array.dtype not in (np.uint16, np.uint32) or array.ndim != 1:
        raise DataError(
            f"data.path: '{path}' holds {array.dtype}{list(array.shape)}; give one dimension of uint16 or uint32"
        )
    offset_bytes = array.offset if isinstance(array, np.memmap) else 0
    return Piece(str(path), array.dtype.name, offset_bytes, len(array))


def _size(path: Path) -> int:
    try:
        with open(path, "rb") as file:  # opened, so that one which cannot be read is known before a run
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"data.path: '{path}' cannot be read: {error.strerror}") from None


def _read_piece(piece: Piece, skipped: int, count: int) -> NDArray[np.int64]:
    width = np.dtype(piece.dtype).itemsize
    try:
        found = np.fromfile(piece.path, piece.dtype, count, offset=piece.offset_bytes + skipped * width)
    except OSError as error:
        raise DataError(f"data.path: '{piece.path}' cannot be read any more: {error.strerror or error}") from None
    if len(found) < count:
        raise DataError(f"data.path: '{piece.path}' became shorter; leave the data alone while it is trained on")
    return found.astype(np.int64)


def _check_vocabulary(pieces: Sequence[Piece], vocabulary: int) -> None:
    if pieces[0].dtype == "uint8":
        if vocabulary < 256:
            raise DataError(f"model.vocabulary: {vocabulary}; bytes of text need 256")
        return
    if vocabulary > 2**16 and any(piece.dtype == "uint16" and piece.path.endswith(".bin") for piece in pieces):
        raise DataError(
            f"data.dtype: uint16 cannot hold the tokens of a vocabulary of {vocabulary}; write them as uint32 and set it to that"
        )
    left = _CHECKED_TOKENS
    for piece in pieces:
        count = min(left, piece.tokens)
        left -= count
        found = _read_piece(piece, 0, count)
        if count and found.max() >= vocabulary:
            raise DataError(
                f"data.path: '{piece.path}' has token {found.max()} at {int(found.argmax())}, beyond a vocabulary of "
                f"{vocabulary}; raise model.vocabulary or prepare the data with its tokenizer"
            )


def _split(pieces: Sequence[Piece], share: float) -> tuple[Tokens, Tokens]:
    """Training and held-out: the held-out share is the tail, cut from the file where it begins."""
    left = round(sum(piece.tokens for piece in pieces) * (1 - share))
    training: list[Piece] = []
    held_out: list[Piece] = []
    for piece in pieces:
        kept = min(left, piece.tokens)
        left -= kept
        after_bytes = piece.offset_bytes + kept * np.dtype(piece.dtype).itemsize
        training.append(piece._replace(tokens=kept))
        held_out.append(piece._replace(offset_bytes=after_bytes, tokens=piece.tokens - kept))
    return Tokens([piece for piece in training if piece.tokens]), Tokens([piece for piece in held_out if piece.tokens])
