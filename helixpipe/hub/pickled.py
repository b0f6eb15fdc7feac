"""Files of torch.save: opened with weights_only, so that no code in them runs, and memory-mapped, so that what is not asked
for is not read.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from helixpipe.errors import ConfigError
from helixpipe.hub.headers import DTYPES, Stored


def opened(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on its own memory. Raises ConfigError for one that holds anything else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ConfigError(
            f"{path}: refused: it holds more than tensors, and what it holds could run code; save it as safetensors"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        first = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{path}: no file of torch.save that can be memory-mapped: {first[:120]}; save it as safetensors"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ConfigError(f"{path}: not a table of tensors; save the model's state_dict")
    return found


def header(path: Path) -> dict[str, Stored]:
    """What a file holds."""
    names = {dtype: ours for ours, dtype in DTYPES.items()}
    return {
        name: Stored(path, name, names.get(str(each.dtype).removeprefix("torch."), str(each.dtype)), tuple(each.shape))
        for name, each in opened(path).items()
    }
