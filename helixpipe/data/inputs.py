"""Inputs: which files are read, in which order, and what each of them is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from helixpipe.data.formats import JSON_LINES_SUFFIXES, TOKEN_SUFFIXES, json_lines, known_as, not_utf8
from helixpipe.errors import ConfigError, DataError
from helixpipe.files import fault

MANIFEST = "manifest.json"
# the largest document; tokenizers take up to a hundred bytes a byte
MOST_DOCUMENT_BYTES = 2**25
_FIRST_BYTES = 8192
_PACKINGS = {".gz": "gz", ".gzip": "gz", ".zst": "zst", ".zstd": "zst"}
_TABLES = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow"}


class Input(NamedTuple):
    """A file. `kind`: text, lines, parquet or arrow; `packing`: "", gz or zst."""

    path: str
    kind: str
    packing: str
    size_bytes: int
    mtime_ns: int


def find(given: Sequence[str], output: Path) -> tuple[list[Input], list[str]]:
    """The files to read, in the order given and sorted within folders; and what was left out because it is no file.

    Raises DataError for what cannot be read as documents.
    """
    found: list[Input] = []
    left_out: list[str] = []
    for name in given:
        path = Path(name)
        if why := fault(path):
            raise DataError(f"'{path}' cannot be read: {why}")
        if path.is_dir():
            if output.resolve().is_relative_to(path.resolve()):
                raise ConfigError(f"--output: '{output}' is in the input '{path}'; give a folder outside of it")
            before = len(found)
            found.extend(_input(file) for file in _files(path, left_out))
            if len(found) == before:
                more = f" ('{left_out[0]}' is no file)" if left_out else ""
                raise DataError(f"'{path}' has no files to prepare{more}; give text, .jsonl, .parquet or a dataset")
        elif path.is_file():
            found.append(_input(path))
        elif path.exists():
            raise DataError(f"'{path}' is neither a file nor a folder; write what it gives to a file")
        elif os.path.lexists(path):
            raise DataError(f"'{path}' is a link to nowhere; mend it, or give the file itself")
        else:
            raise DataError(f"'{path}' does not exist; give text, .jsonl, .parquet, a dataset, or a folder of them")
    return found, left_out


def _files(folder: Path, left_out: list[str]) -> Iterator[Path]:
    """The files below a folder, sorted; of a dataset saved to disk those that it lists. Hidden names are left out."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"'{error.filename}' cannot be read: {error.strerror}") from None

    for parent, folders, files in os.walk(folder, onerror=refuse):
        here = Path(parent)
        if "dataset_dict.json" in files:
            _refuse_splits(here)
        if "state.json" in files and (listed := _listed(here)) is not None:
            folders.clear()
            yield from listed
            continue
        if MANIFEST in files and is_prepared(here):
            raise DataError(f"'{here}' is prepared already; train on it as data.path")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        left_out += [str(here / name) for name in folders if (here / name).is_symlink()]
        for name in sorted(name for name in files if not name.startswith(".")):
            if (here / name).is_file():
                yield here / name
            else:
                left_out.append(str(here / name))


def _refuse_splits(folder: Path) -> None:
    splits = _json(folder / "dataset_dict.json").get("splits")
    if isinstance(splits, list) and len(splits) > 1:
        names = ", ".join(map(str, splits))
        raise DataError(f"'{folder}' is a dataset of splits {names}; give one of them, such as '{folder}/{splits[0]}'")


def _listed(folder: Path) -> list[Path] | None:
    """The arrow files of a dataset saved to disk, in its order; None where a folder is none."""
    state = _json(folder / "state.json")
    listed = state.get("_data_files")
    if not isinstance(listed, list):
        return None
    if state.get("_indices_data_files"):
        raise DataError(
            f"'{folder}' is a dataset with its rows selected by indices; save it flattened (flatten_indices)"
        )
    paths = [folder / str(each.get("filename") if isinstance(each, dict) else each) for each in listed]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"'{missing}' is missing, and state.json beside it lists it; save the dataset anew")
    return paths


def is_prepared(folder: Path) -> bool:
    """Whether a folder has the manifest of a prepared one."""
    try:
        return str(_json(folder / MANIFEST).get("format", "")).startswith("helixpipe")
    except DataError:
        return False


def _json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DataError(f"'{path}' cannot be read as JSON; save it anew") from None
    return found if isinstance(found, dict) else {}


def _input(path: Path) -> Input:
    try:
        with path.open("rb") as file:
            first, known = file.read(_FIRST_BYTES), os.fstat(file.fileno())
            kind, packing = _kind(path, first)
            if kind == "text" and json_lines(path, file, first):
                _refuse(path, "is JSON lines; name it .jsonl")
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from None
    return Input(str(path), kind, packing, known.st_size, known.st_mtime_ns)


def _kind(path: Path, first: bytes) -> tuple[str, str]:
    suffix = path.suffix.lower()
    packing = _PACKINGS.get(suffix, "")
    inner = path.with_suffix("").suffix.lower() if packing else suffix
    if inner in JSON_LINES_SUFFIXES:
        if packing:
            return "lines", packing
        if (marked := known_as(Path("a"), first)) is not None:
            _refuse(path, f"is {marked.what}; name it by what it is, as in .jsonl.gz")
        if first[:4].count(0) or first[:2] in (b"\xff\xfe", b"\xfe\xff"):
            _refuse(path, not_utf8(first))
        return "lines", ""
    if suffix in _TABLES:
        return _TABLES[suffix], ""
    if suffix in TOKEN_SUFFIXES or suffix == ".idx":
        _refuse(path, "has tokens and not text; train on it as data.path")
    if (known := known_as(path, first)) is not None:
        todo = f"name it .jsonl{suffix} if it holds JSON lines, or unpack it" if packing else known.todo
        _refuse(path, f"is {known.what}; {todo}")
    if why := not_utf8(first):
        _refuse(path, why)
    if suffix == ".json" and _is_list_of_records(first):
        _refuse(path, "is a list of JSON records; write one a line (jq -c '.[]') and name it .jsonl")
    return "text", ""


def _is_list_of_records(first: bytes) -> bool:
    return b"".join(first.removeprefix(b"\xef\xbb\xbf").split()).startswith(b"[{")


def _refuse(path: Path, why: str) -> NoReturn:
    raise DataError(f"'{path}' {why}")
