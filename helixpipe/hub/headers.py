"""Headers: which tensors a folder's files hold, of what type and size, without reading any of them and without torch.

model.safetensors                                8 bytes of length, JSON, the bytes of tensors
model.safetensors.index.json                     tensor -> file, of many
pytorch_model.bin, pytorch_model.bin.index.json  torch's, read by torch, and only with weights_only
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from helixpipe.errors import ConfigError

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""As a header spells them -> torch's name."""
_LONGEST = 100_000_000  # bytes of a header, as safetensors itself has it


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    name: str
    dtype: str
    """As in a safetensors header."""
    size: tuple[int, ...]


def stored_in(folder: Path, names: tuple[str, ...] = (SAFE, PICKLED)) -> dict[str, Stored]:
    """Every tensor of a folder's weights, in the first of these files or in those of its index. Raises ConfigError for a file that is missing, truncated or no such file."""
    for name in names:
        if (folder / name).is_file():
            return _of_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _of_index(index)
    raise ConfigError(
        f"{folder}: no weights there: neither {' nor '.join(names)}, nor an index of many; give a whole folder"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ConfigError."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not a JSON object; give a file that transformers wrote")
    return found


def _of_index(index: Path) -> dict[str, Stored]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(each, str) for each in where.values()):
        raise ConfigError(f"{index}: no weight_map of tensors to files; give a file that transformers wrote")
    found: dict[str, Stored] = {}
    for name in sorted(set(where.values())):
        shard = index.parent / name
        if Path(name).name != name:
            raise ConfigError(f"{index}: '{name}' is in another folder; shards lie beside their index")
        if not shard.is_file():
            raise ConfigError(f"{shard}: missing, and {index.name} says that tensors are in it; fetch it again")
        found |= _of_file(shard)
    for tensor, name in where.items():
        if tensor not in found or found[tensor].file.name != name:
            raise ConfigError(f"{index.parent / name}: {tensor} is not in it, and {index.name} says so; fetch it again")
    return found


def _of_file(path: Path) -> dict[str, Stored]:
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    from helixpipe.hub.pickled import header  # which brings torch in

    return header(path)


def _of_safetensors(path: Path) -> dict[str, Stored]:
    try:
        held = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(_LONGEST, held) else b""
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    if len(text) < length or held < 8:
        raise ConfigError(f"{path}: truncated, or not safetensors: it ends within its header; fetch it again")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _stored(path, name, line) for name, line in header.items()}
        ends = max((line["data_offsets"][1] for line in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ConfigError(f"{path}: not safetensors: its header is not one; fetch it again") from None
    if held != 8 + length + ends:
        raise ConfigError(f"{path}: truncated: {held:,} bytes where {8 + length + ends:,} were written; fetch it again")
    return found


def _stored(path: Path, name: str, line: dict[str, Any]) -> Stored:
    return Stored(path, name, str(line["dtype"]), tuple(map(int, line["shape"])))


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether a text is meant as a path rather than as a name."""
    text = os.fspath(path)
    return os.sep in text or text.endswith(".json") or os.path.isdir(text)
