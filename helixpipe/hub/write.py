"""Write: a model as a Hugging Face folder, tensor by tensor, whole or not at all.

    read("layers.0.qkv.q.weight") ──► rows of one tensor ──► turned, in the dtype asked for ──► its place in a file

Nothing but the tensor at hand is in memory. The folder has its name once everything in it is on the disk.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from helixpipe.errors import ConfigError, HelixpipeError
from helixpipe.files import json_text
from helixpipe.hub.architecture import Place
from helixpipe.hub.folder import CONFIG
from helixpipe.hub.headers import DTYPES, SAFE

CARRIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "chat_template*", "additional_chat_templates",
)  # fmt: skip
"""What goes along from the folder that a model came from."""
_CODES = {name: code for code, name in DTYPES.items()}
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Line:
    """A tensor to write, and the parameters that are its rows."""

    name: str
    size: tuple[int, ...]
    transposed: bool
    ours: tuple[str, ...]

    def nbytes(self, dtype: torch.dtype) -> int:
        return torch.Size(self.size).numel() * dtype.itemsize


def lines_of(places: dict[str, Place]) -> list[Line]:
    """What files are to hold, in the model's order."""
    rows: dict[str, list[str]] = {}
    for ours, place in sorted(places.items(), key=lambda each: each[1].start):
        rows.setdefault(place.tensor, []).append(ours)
    first = {place.tensor: place for place in places.values()}
    return [Line(name, place.size, place.transposed, tuple(rows[name])) for name, place in first.items()]


def named_dtype(name: str) -> torch.dtype:
    """Raises ConfigError for one that weights are not saved in."""
    if name not in _CODES:
        raise ConfigError(f"--dtype: '{name}' is not known; known: {', '.join(_CODES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def size_in_bytes(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes; raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    found = int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2]]) if match else 0
    if found < 1:
        raise ConfigError(f"--max-shard-size: '{text}' is no size; write 5GB, 500MB or 2GiB")
    return found


def shards_of(lines: Sequence[Line], dtype: torch.dtype, most: int) -> dict[str, list[Line]]:
    """File name -> what is in it: as many tensors, in order, as `most` bytes hold, and one at least."""
    shards: list[list[Line]] = [[]]
    held = 0
    for line in lines:
        if shards[-1] and held + line.nbytes(dtype) > most:
            shards.append([])
            held = 0
        shards[-1].append(line)
        held += line.nbytes(dtype)
    if len(shards) == 1:
        return {SAFE: shards[0]}
    stem, suffix = SAFE.split(".")
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.{suffix}": each for i, each in enumerate(shards, 1)}


def write_folder(
    target: Path,
    config: dict[str, Any],
    shards: dict[str, list[Line]],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    carried_from: Path | None,
    config_name: str = CONFIG,
) -> None:
    """Write it. Raises ConfigError where something is already, HelixpipeError where it cannot be written."""
    with new_folder(target) as beside:
        (beside / config_name).write_text(_strict(config, config_name) + "\n", encoding="utf-8")
        for name, lines in shards.items():
            with (beside / name).open("wb") as file:
                _write_file(file, lines, dtype, read)
                file.flush()
                os.fsync(file.fileno())
        if len(shards) > 1:
            where = {line.name: name for name, lines in shards.items() for line in lines}
            total = sum(line.nbytes(dtype) for lines in shards.values() for line in lines)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (beside / f"{SAFE}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if carried_from is not None:
            _carry(carried_from, beside)


def _strict(config: dict[str, Any], name: str) -> str:
    """A config as JSON. Raises ConfigError for a number that JSON has no word for."""
    for key, value in config.items():
        if json_text(value) != json.dumps(value):
            raise ConfigError(
                f"{name}: {key} is {json.dumps(value)}, which is no JSON; change it in the folder that the run came from"
            )
    return json.dumps(config, indent=2, allow_nan=False)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when all went well and is gone when not."""
    refuse_existing(target)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir()
        try:
            yield beside
            beside.rename(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise HelixpipeError(f"{target}: cannot be written: {(error.strerror or str(error)).lower()}") from None


def refuse_existing(target: Path) -> None:
    """Raise ConfigError for a folder that cannot be new."""
    if os.path.lexists(target):
        raise ConfigError(f"{target}: is there already; name a new folder, or remove it")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target}: {target.parent} is no folder; make it, or name another")


def _write_file(file: BinaryIO, lines: list[Line], dtype: torch.dtype, read: Callable[[str], Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for line in lines:
        end = at + line.nbytes(dtype)
        code = _CODES[str(dtype).removeprefix("torch.")]
        header[line.name] = {"dtype": code, "shape": list(line.size), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for line in lines:
        tensor = made(line, dtype, read)
        tensor.view(torch.uint8).numpy().tofile(file)


def made(line: Line, dtype: torch.dtype, read: Callable[[str], Tensor]) -> Tensor:
    """A tensor as a file holds it. Raises HelixpipeError for numbers that are not finite, or not in this dtype."""
    rows = [read(name) for name in line.ours]
    whole = torch.cat(rows) if len(rows) > 1 else rows[0]
    found = (whole.T if line.transposed else whole).to(dtype).contiguous()
    if found.numel() and not all(map(torch.isfinite, torch.aminmax(found))):
        finite = bool(torch.isfinite(whole).all())
        what = f"some of its numbers are beyond {_name(dtype)}; use bfloat16" if finite else "it is not finite"
        raise HelixpipeError(f"{', '.join(line.ours)}: {what}; nothing is written")
    return found


def _carry(source: Path, target: Path) -> None:
    try:
        names = os.listdir(source)  # Path.glob finds nothing where it may not look
    except OSError as error:
        raise HelixpipeError(
            f"{source}: what is in it cannot be listed: {(error.strerror or str(error)).lower()}"
        ) from None
    for name in sorted(names):
        path = source / name
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in CARRIED):
            continue
        if path.is_dir():
            shutil.copytree(path, target / name)
        else:
            shutil.copyfile(path, target / name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
