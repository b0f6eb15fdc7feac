"""Token files: every file below a path, as pieces of tokens; what is neither text nor tokens is refused by name."""

from __future__ import annotations

import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from helixpipe.config_data import DataConfig
from helixpipe.data.formats import holds_tokens, refusal
from helixpipe.data.inputs import MANIFEST, is_prepared
from helixpipe.data.megatron_index import index_of, indexed_dtype, paired
from helixpipe.errors import DataError
from helixpipe.files import fault
from helixpipe.train.pieces import Piece, read_piece

# not what people write as a program: tests, vendored packages, and tables
_STDLIB_SKIPPED = frozenset({
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo",
    "ensurepip", "encodings", "pydoc_data",
})  # fmt: skip
# token files are searched for ids beyond the vocabulary so far before a run, and batch by batch in it
_CHECKED_TOKENS = 2**24
# of a .bin whose dtype nothing states, so many are enough to see that it is not uint16
_LOOKED_AT_TOKENS = 4096


def find_files(given: str) -> tuple[list[Path], str]:
    """Every file to read, in an order that is the same on every machine, and what of a folder is left out, "" if nothing."""
    if not given:
        library = Path(sysconfig.get_paths()["stdlib"])
        return [path for path in _walk(library, _STDLIB_SKIPPED) if path.suffix == ".py" and _is_file(path)], ""
    path = paired(Path(given)) or Path(given)
    if why := fault(path):
        raise DataError(f"data.path: '{path}' cannot be read: {why}")
    if path.is_dir():
        found = list(_walk(path))
        files = [file for file in found if _is_file(file) and not _is_index(file)]
        others = [file for file in found if not _is_file(file)]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        left_out = f"not read: '{others[0]}'{more}, no files; links to folders are not followed" if others else ""
        _check_folder(path, files)
        return files, left_out
    if not path.exists():
        raise DataError(f"data.path: '{path}' does not exist; give a text file, a folder of them, or .npy/.bin tokens")
    if not path.is_file():
        raise DataError(f"data.path: '{path}' is neither a file nor a folder")
    if not _is_indexed(path) and (why := refusal(path)):
        raise DataError(why)
    return [path], ""


def _check_folder(folder: Path, files: Sequence[Path]) -> None:
    """Raise DataError where a folder has what is neither text nor tokens, or both, or a prepared folder."""
    inside = next((file.parent for file in files if file.name == MANIFEST and is_prepared(file.parent)), None)
    if inside is not None:
        raise DataError(f"data.path: '{inside}' is what helixpipe prepare wrote; give it by itself, not '{folder}'")
    refused = [why for file in files if not _is_indexed(file) and (why := refusal(file))]
    if refused:
        more = len(refused) - 1
        raise DataError(refused[0] + (f" (refused in '{folder}' as well: {more} more)" if more else ""))
    tokens = [file for file in files if holds_tokens(file)]
    if tokens and len(tokens) < len(files):
        other = next(file for file in files if not holds_tokens(file))
        raise DataError(f"data.path: '{folder}' mixes tokens ('{tokens[0]}') and text ('{other}'); separate them")


def _walk(folder: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """What is below a folder and no folder itself, sorted; hidden names are left out."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"data.path: '{error.filename}' cannot be read: {error.strerror}") from None

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for name in folders if (path := Path(parent, name)).is_symlink())


def _is_file(path: Path) -> bool:
    """Whether there is a file: a link to nowhere or a pipe is none. Raises DataError where that cannot be known."""
    try:
        return path.is_file()
    except OSError as error:
        raise DataError(f"data.path: '{path}' cannot be read: {error.strerror}") from None


def _is_indexed(path: Path) -> bool:
    return path.suffix.lower() == ".bin" and index_of(path) is not None


def _is_index(path: Path) -> bool:
    """Whether a file is the index of a .bin beside it."""
    return path.suffix.lower() == ".idx" and any(path.with_suffix(suffix).exists() for suffix in (".bin", ".BIN"))


def as_piece(path: Path, config: DataConfig, vocabulary: int) -> Piece:
    """All of a file; raises DataError for one that holds no tokens of the vocabulary."""
    if not holds_tokens(path):
        return Piece(str(path), "uint8", 0, _size(path))
    return _numpy(path) if path.suffix.lower() == ".npy" else _bin(path, config, vocabulary)


def _bin(path: Path, config: DataConfig, vocabulary: int) -> Piece:
    size, index, dtype = _size(path), index_of(path), config.dtype or "uint16"
    if index is not None:
        found = indexed_dtype(index, path, size)
        # int32 and uint32 are the same ids
        if config.dtype and np.dtype(found).itemsize != np.dtype(config.dtype).itemsize:
            raise DataError(f"data.dtype: {config.dtype}, and '{index}' says {found}; leave data.dtype out")
        return Piece(str(path), found, 0, size // np.dtype(found).itemsize)
    width = np.dtype(dtype).itemsize
    if size % width:
        raise DataError(
            f"data.path: '{path}' has {size} bytes, not a multiple of {dtype}'s {width}; set data.dtype to what it holds"
        )
    if vocabulary > 2**16 and dtype == "uint16":
        raise DataError(
            f"data.dtype: uint16 cannot hold the tokens of a vocabulary of {vocabulary}; write them as uint32 and set it to that"
        )
    return Piece(str(path), dtype, 0, size // width)


def _numpy(path: Path) -> Piece:
    try:
        with warnings.catch_warnings(action="ignore"):  # of a header that overflows: it is refused
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"data.path: '{path}' cannot be read: {error.strerror or error}") from None
    except Exception:  # a wrong magic, objects, fewer bytes than the header says; a damaged header fails in any way
        raise DataError(f"data.path: '{path}' is not a whole .npy array of numbers; write it with numpy.save") from None
    if array.dtype not in (np.uint16, np.uint32, np.int32, np.int64) or array.ndim != 1:
        raise DataError(
            f"data.path: '{path}' holds {array.dtype}{list(array.shape)}; give one dimension of uint16, uint32, int32 or int64"
        )
    offset_bytes = array.offset if isinstance(array, np.memmap) else 0
    return Piece(str(path), array.dtype.name, offset_bytes, len(array))


def _size(path: Path) -> int:
    try:
        with open(path, "rb") as file:  # opened, so that one which cannot be read is known before a run
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"data.path: '{path}' cannot be read: {error.strerror}") from None


def check_vocabulary(pieces: Sequence[Piece], vocabulary: int) -> None:
    """Raise DataError where tokens go beyond the vocabulary, as far as is looked."""
    if not holds_tokens(pieces[0].path):
        if vocabulary < 256:
            raise DataError(f"model.vocabulary: {vocabulary}; bytes of text need 256")
        return
    left = _CHECKED_TOKENS
    for piece in pieces:
        count = min(left, piece.tokens)
        left -= count
        found = read_piece(piece, 0, count)
        at = misfit(found, vocabulary)
        if at is not None:
            raise DataError(
                f"data.path: '{piece.path}' has token {found[at]} at {at}, beyond a vocabulary of "
                f"{vocabulary}; raise model.vocabulary or prepare the data with its tokenizer"
            )


def misfit(tokens: NDArray[np.int64], vocabulary: int) -> int | None:
    """Where a token is that a vocabulary does not have, in the flat array; None where all fit."""
    for at in (tokens.argmax(), tokens.argmin()) if tokens.size else ():
        if not 0 <= tokens.flat[at] < vocabulary:
            return int(at)
    return None


def file_remarks(pieces: Sequence[Piece], vocabulary: int, left_out: str) -> Iterator[str]:
    """What a user should know of files but need not mend, a line each."""
    if left_out:
        yield f"data.path: {left_out}"
    if not holds_tokens(pieces[0].path):
        if vocabulary > 256:
            yield (
                f"data.path: text is read as bytes, which are 256 of the {vocabulary} words of model.vocabulary; "
                "set it to 256, or give tokens of its tokenizer as .npy or .bin"
            )
        return
    for piece in pieces:
        if piece.dtype == "uint16" and piece.path.lower().endswith(".bin") and index_of(Path(piece.path)) is None:
            found = read_piece(piece, 0, min(piece.tokens, _LOOKED_AT_TOKENS))
            if found.any() and not found[1::2].any() and len(found) > 1:
                yield (
                    f"data.path: '{piece.path}' has 0 for every second token, as 32-bit tokens read as uint16 do; "
                    "set data.dtype to uint32 if it holds these"
                )
                return
