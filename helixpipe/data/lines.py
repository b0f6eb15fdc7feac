"""Lines of a file, plain or packed, by byte ranges; no line is held beyond the size that a document may have."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from helixpipe.data.extras import needed
from helixpipe.data.inputs import MOST_DOCUMENT_BYTES
from helixpipe.errors import DataError

MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 2**16


class Cut(Exception):
    """A packed file that ends too early or is damaged."""


class Lines:
    """The lines that begin in bytes [start, stop) of a file. All of a packed file are read: `stop` is its size.

    Iterating gives (number within this range from 1, bytes or None for a line that is too long); raises Cut. `count` lines
    were begun so far; `done_bytes` says how far it is, of stop - start.
    """

    def __init__(self, path: str, packing: str, start: int, stop: int) -> None:
        self.path, self.packing, self.start, self.stop = path, packing, start, stop
        self.count = self.done_bytes = 0
        self._begin = start

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        with open(self.path, "rb") as raw:
            if self.packing:
                yield from self._packed(raw)
            else:
                yield from self._plain(raw)

    def before(self) -> int:
        """How many lines of the file begin before this range; they are counted now."""
        return 0 if self.packing else _newlines(self.path, self._begin)

    def _plain(self, file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
        if self.start:  # a line that begins before is the range's before; the byte before may end it
            file.seek(self.start - 1)
            _skip_line(file, self.stop)
        self._begin = at = file.tell()
        while at < self.stop and (line := _line(file, self.stop)) != b"":
            self.count += 1
            at = file.tell()
            self.done_bytes = min(at, self.stop) - self.start
            yield self.count, line.removeprefix(MARK) if line and self._begin == 0 and self.count == 1 else line

    def _packed(self, raw: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
        try:
            with _unpacked(raw, self.packing, self.path) as file:
                while (line := _line(file)) != b"":
                    self.count += 1
                    self.done_bytes = raw.tell()
                    yield self.count, line.removeprefix(MARK) if line and self.count == 1 else line
        except EOFError:
            raise Cut("is cut short") from None
        except (zlib.error, gzip.BadGzipFile, _Damaged):
            raise Cut("is damaged") from None


def decoded(line: bytes) -> str:
    """The text of bytes; raises DataError, which says what to do, for what is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02X}); convert the file: iconv -f LATIN1 -t UTF-8"
        ) from None


def whole(path: str) -> str:
    """The text of a file as it stands, line ends too, without a mark at its head; raises DataError (no path in it)."""
    return decoded(Path(path).read_bytes().removeprefix(MARK))


def _line(file: IO[bytes], stop: int | None = None) -> bytes | None:
    """The next line with its end, b"" after the last, None for one that is too long, which is passed over up to `stop`."""
    line = file.readline(MOST_DOCUMENT_BYTES + 1)
    if len(line) <= MOST_DOCUMENT_BYTES:
        return line
    if not line.endswith(b"\n"):
        _skip_line(file, stop)
    return None


def _skip_line(file: IO[bytes], stop: int | None) -> None:
    """Pass over the rest of a line, or at least up to `stop`: what begins after that is another range's."""
    while (line := file.readline(_BLOCK_BYTES)) and not line.endswith(b"\n") and (stop is None or file.tell() < stop):
        pass


def _newlines(path: str, stop: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(stop, 2**20))):
            count, stop = count + block.count(b"\n"), stop - len(block)
    return count


class _Damaged(Exception):
    """Bytes that zstd does not understand."""


def _unpacked(raw: IO[bytes], packing: str, path: str) -> IO[bytes]:
    if packing == "gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[return-value]
    return io.BufferedReader(_Zstd(raw, needed("zstandard", f"'{path}'")), _BLOCK_BYTES)


class _Zstd(io.RawIOBase):
    """Frames of zstd one after another; EOFError where the last is not whole, which zstandard's own reader hides."""

    def __init__(self, raw: IO[bytes], zstandard: Any) -> None:
        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            packed = self._raw.read(2**14)
            if not packed:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._left = memoryview(self._unpack(packed))
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        found = []
        while packed:
            self._frame = self._frame or self._zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                found.append(self._frame.decompress(packed))
            except self._zstandard.ZstdError:
                raise _Damaged from None
            packed = b""
            if self._frame.eof:
                packed, self._frame = self._frame.unused_data, None
        return b"".join(found)
