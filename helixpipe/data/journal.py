"""The journal of an output folder that is being written, and the manifest of one that is whole.

The journal's first line is what was asked for, of which inputs; then a line follows for each unit of work whose shards are
on disk. The manifest is written last, and the journal then taken away: a folder with a manifest is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from helixpipe.data.inputs import MANIFEST
from helixpipe.data.shards import TEMPORARY, Done, cannot_write, from_table, save
from helixpipe.errors import ConfigError
from helixpipe.files import make_folder

JOURNAL = "journal.jsonl"
FORMAT, VERSION = "helixpipe tokens", 1


def line(table: dict[str, Any]) -> str:
    return json.dumps(table, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(manifest: dict[str, Any]) -> str:
    """What a manifest is known by: of all of it but its digest."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return "sha256:" + hashlib.sha256(line(rest).encode()).hexdigest()


class Journal:
    """An output folder, locked for one command. `asked` is what decides the output; `done` what is on disk already."""

    def __init__(self, folder: Path, asked: dict[str, Any], kept: dict[str, Any]) -> None:
        """`kept` is remembered from the first start on, whatever is given later: the day. Raises ConfigError, WriteError."""
        self.folder, self.done, self.kept = folder, dict[int, Done](), kept
        self.manifest: dict[str, Any] | None = None
        try:
            make_folder(folder)
            names = os.listdir(folder)
            if MANIFEST in names:
                self.manifest = _whole(folder, asked)
                return
            if JOURNAL not in names and [name for name in names if not name.endswith(TEMPORARY)]:
                raise ConfigError(f"--output: '{folder}' has other files ('{sorted(names)[0]}'); give a new folder")
            self._file: IO[bytes] = (folder / JOURNAL).open("a+b")
            self._lock()
            self._read(asked)
            self._clean()
        except OSError as error:
            if isinstance(error, FileExistsError | NotADirectoryError):
                raise ConfigError(f"--output: '{folder}' is no folder; give one") from None
            raise cannot_write(folder, error) from None

    def add(self, done: Done) -> None:
        """A unit's shards are on disk."""
        self.done[done.unit] = done
        self._write(done.table())

    def forget(self, units: list[int]) -> None:
        """These are to be done anew."""
        for unit in units:
            del self.done[unit]

    def finish(self, manifest: dict[str, Any]) -> None:
        """Make the folder a whole one."""
        self._clean()
        text = json.dumps(manifest | {"digest": digest(manifest)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        save(self.folder / MANIFEST, text.encode("utf-8", "backslashreplace"))
        (self.folder / JOURNAL).unlink()
        self._file.close()

    def close(self) -> None:
        if self.manifest is None:
            with suppress(OSError):  # what was not written is written again, where the disk was full
                self._file.close()

    def _write(self, table: dict[str, Any]) -> None:
        try:
            self._file.write(line(table).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--output: another command is writing '{self.folder}'; let it end, or stop it") from None

    def _read(self, asked: dict[str, Any]) -> None:
        """What is done. A line that was being written when the command was stopped is taken away."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        lines = [json.loads(each) for each in whole.splitlines()]
        if not lines:
            self._write({"asked": asked, "kept": self.kept})
            return
        _check_same(self.folder, lines[0]["asked"], asked)
        self.kept = lines[0]["kept"]
        done = [from_table(each) for each in lines[1:]]
        self.done = {each.unit: each for each in done if self._is_there(each)}

    def _is_there(self, done: Done) -> bool:
        return all((self.folder / f"{shard.name}.tokens").is_file() for shard in done.shards)

    def _clean(self) -> None:
        """Take away what an interrupted command left half done."""
        known = {
            f"{shard.name}{suffix}" for done in self.done.values() for shard in done.shards for suffix in _SUFFIXES
        }
        half = [path for path in self.folder.iterdir() if path.name.endswith(_SUFFIXES) and path.name not in known]
        for path in (*half, *self.folder.rglob(f"*{TEMPORARY}")):
            path.unlink(missing_ok=True)


_SUFFIXES = (".tokens", ".documents", ".mask")


def _whole(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a folder that this command has written before."""
    try:
        if not (folder / MANIFEST).is_file():  # a pipe would be waited for
            raise ValueError
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        before = found["options"] | {"inputs": found["inputs"], "tokenizer": found["tokenizer"]["digest"]}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--output: '{folder}' has a {MANIFEST} of something else; give a new folder") from None
    now = asked["options"] | {
        "inputs": [{key: value for key, value in each.items() if key != "mtime_ns"} for each in asked["inputs"]],
        "tokenizer": asked["tokenizer"],
    }
    _check_same(folder, before, now)
    (folder / JOURNAL).unlink(missing_ok=True)
    return dict(found)


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError where an output folder is another command's."""
    flat = [table.get("options", {}) | {k: v for k, v in table.items() if k != "options"} for table in (before, now)]
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        if flat[0].get(key) != flat[1].get(key):
            told = "" if key in ("inputs", "units", "tokenizer") else f": {flat[0].get(key)}, now {flat[1].get(key)}"
            raise ConfigError(
                f"--output: '{folder}' was begun with other {key.replace('_', ' ')}{told}; give a new folder"
            )
