"""Formats: what a file is by its name and first bytes, and why one that is neither text nor tokens is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

from helixpipe.errors import DataError

TOKEN_SUFFIXES = (".npy", ".bin")
# so much of a file is looked at
_BLOCK_BYTES = 8192
# a line of JSON that is longer is not read to its end
_LINE_BYTES = 2**24
# with these names text may be JSON lines unannounced; .log or .py says that they are meant
_NEUTRAL_SUFFIXES = ("", ".txt", ".text", ".json")
_MARKS = (  # longest first: UTF-32's begins with UTF-16's
    (b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
)  # fmt: skip

_UNPACK = "unpack it"
_EXTRACT = "write its text to text files, or its tokens to .npy or .bin"
_PREPARE = "make tokens of it: helixpipe prepare"
JSON_LINES_SUFFIXES = (".jsonl", ".jsonlines", ".json-lines", ".ldjson", ".ndjson")


class Kind(NamedTuple):
    """A format that is refused: by its names, by a pattern of its first bytes, or by both."""

    what: str
    todo: str
    suffixes: tuple[str, ...]
    first_bytes: bytes | None


# patterns are four bytes or more, so that tokens of a .bin hardly ever begin like one
_KINDS = (
    Kind("gzip-compressed", _UNPACK, (".gz", ".gzip", ".tgz"), rb"\x1f\x8b\x08[\x00-\x1f]"),
    Kind("zstd-compressed", _UNPACK, (".zst", ".zstd", ".tzst"), rb"\x28\xb5\x2f\xfd"),
    Kind("bzip2-compressed", _UNPACK, (".bz2", ".bz", ".tbz", ".tbz2"), rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    Kind("xz-compressed", _UNPACK, (".xz", ".txz", ".lzma"), rb"\xfd7zXZ\x00"),
    Kind("lz4-compressed", _UNPACK, (".lz4",), rb"\x04\x22\x4d\x18"),
    Kind("compressed", _UNPACK, (".br", ".lz", ".lzo", ".sz", ".snappy", ".z"), None),
    Kind("an archive of NumPy arrays", "save one array with numpy.save", (".npz",), None),
    Kind("model weights", "give text or tokens", (".ckpt", ".gguf", ".pt", ".pth", ".safetensors"), None),
    Kind("a zip archive", _UNPACK, (".zip",), rb"PK(\x03\x04|\x05\x06|\x07\x08)"),
    Kind("a tar archive", _UNPACK, (".tar",), rb"(?s:.{257})ustar"),
    Kind("a 7z archive", _UNPACK, (".7z",), rb"7z\xbc\xaf\x27\x1c"),
    Kind("a rar archive", _UNPACK, (".rar",), rb"Rar!\x1a\x07"),
    Kind("an ar archive", _UNPACK, (".a", ".deb"), rb"!<arch>\n"),
    Kind("JSON lines", _PREPARE, JSON_LINES_SUFFIXES, None),
    Kind("a Parquet table", _PREPARE, (".parquet", ".pq"), rb"PAR1\x15"),
    Kind("an Arrow table", _PREPARE, (".arrow", ".feather"), rb"ARROW1\x00\x00"),
    Kind("an ORC table", _EXTRACT, (".orc",), None),
    Kind("an Avro table", _EXTRACT, (".avro",), rb"Obj\x01"),
    Kind("an HDF5 file", _EXTRACT, (".h5", ".hdf5"), rb"\x89HDF\r\n\x1a\n"),
    Kind("an SQLite database", _EXTRACT, (".sqlite", ".sqlite3"), rb"SQLite format 3\x00"),
    Kind("a TFRecord file", _EXTRACT, (".tfrecord", ".tfrecords"), None),
    Kind("a pickle", _EXTRACT, (".pickle", ".pkl"), rb"\x80([\x04\x05]\x95(?s:.{6})\x00\x00|\x02\x8a\x0al\xfc\x9cF\xf9)"),
    Kind("a PDF", _EXTRACT, (".pdf",), rb"%PDF-"),
    Kind("a PNG image", "give text or tokens", (".png",), rb"\x89PNG\r\n\x1a\n"),
    Kind("a JPEG image", "give text or tokens", (".jpeg", ".jpg"), rb"\xff\xd8\xff[\xdb\xe0-\xef]"),
    Kind("an ELF binary", "give text or tokens", (), rb"\x7fELF"),
    Kind("an index of tokens", "give the .bin beside it", (".idx",), rb"MMIDIDX\x00\x00"),
)  # fmt: skip
_NUMPY = Kind("a NumPy array", "name it .npy", (), rb"\x93NUMPY")


def holds_tokens(path: str | Path) -> bool:
    """Whether a file is read as tokens and not as text: its name says so."""
    return Path(path).suffix.lower() in TOKEN_SUFFIXES


def refusal(path: Path) -> str:
    """Why a file is neither text nor tokens, in one line; "" where it may be. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            first = file.read(_BLOCK_BYTES)
            known = known_as(path, first)
            why = _line(known) if known else ""
            if not why and not holds_tokens(path):
                why = not_utf8(first) or json_lines(path, file, first)
    except OSError as error:
        raise DataError(f"data.path: '{path}' cannot be read: {error.strerror}") from None
    return f"data.path: '{path}' {why}" if why else ""


def known_as(path: Path, first: bytes) -> Kind | None:
    """The format of a file that is neither text nor tokens, by its name or its first bytes; None where it may be."""
    suffix = path.suffix.lower()
    named = [kind for kind in _KINDS if suffix in kind.suffixes]
    known = _KINDS if suffix == ".npy" else (*_KINDS, _NUMPY)
    marked = [kind for kind in known if kind.first_bytes and re.match(kind.first_bytes, first)]
    return next(iter((*named, *marked)), None)


def _line(kind: Kind) -> str:
    return f"is {kind.what}, neither text nor tokens; {kind.todo}"


def not_utf8(first: bytes) -> str:
    """Why bytes are no text of bytes; "" where they may be, in whatever 8-bit encoding."""
    for mark, name in _MARKS:
        if first.startswith(mark):
            return f"is {name} text; convert it to UTF-8: iconv -f {name} -t UTF-8"
    if (at := first.find(0)) >= 0:
        return f"has a NUL byte at {at}: it is not text, or not in UTF-8; give UTF-8 text, or tokens named .npy or .bin"
    return ""


def json_lines(path: Path, file: BinaryIO, first: bytes) -> str:
    """Why text is JSON lines: the first two lines are an object each. A JSON file has one, over one line or many."""
    if path.suffix.lower() not in _NEUTRAL_SUFFIXES or not first.removeprefix(b"\xef\xbb\xbf").startswith(b"{"):
        return ""
    file.seek(0)
    for _ in range(2):
        try:
            found = json.loads(file.readline(_LINE_BYTES).decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return ""
        if not isinstance(found, dict):
            return ""
    return next(_line(kind) for kind in _KINDS if kind.what == "JSON lines")
