"""Loaded: the model in a folder. A rank is given what it holds of its own parts' parameters, read from the files.

    file   [q k v rows, hidden] ──rows of q──► ──this tensor-parallel rank's──► the parameter, float32 or wider

Nothing else is read, and files are open only while a tensor is: a rank holds its share and one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from helixpipe.errors import ConfigError
from helixpipe.hub.adapter import Adapter
from helixpipe.hub.folder import Folder, Source
from helixpipe.hub.headers import DTYPES, Stored
from helixpipe.hub.pickled import opened
from helixpipe.model.decoder import Decoder, Held, put
from helixpipe.parts.lora import Lora
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.slices import slice_of, whole_name

ROWS = 4096
"""Of a table, compared with its twin at a time."""


@dataclass(frozen=True)
class Range:
    """Rows and columns of a tensor in a file."""

    rows: tuple[int, int]
    columns: tuple[int, int] | None
    """None of a vector."""

    def of(self, tensor: Tensor) -> Tensor:
        """Of a tensor, or of what stands for one that is not read yet."""
        if self.columns is None:
            return tensor[slice(*self.rows)]
        return tensor[slice(*self.rows), slice(*self.columns)]


class Loaded(Decoder):
    """A Decoder whose parameters come from a folder."""

    def __init__(
        self,
        folder: Folder,
        shape: ModelShape | None = None,
        mlp_chunk: int = 0,
        head_chunk: int = 0,
        z_loss: float = 0.0,
        empty: bool = False,
        seed: int = 0,
        adapter: Adapter | None = None,
    ) -> None:
        """`shape`: the folder's, with what may differ. `empty`: leave the values to whoever fills them, such as a
        checkpoint. `adapter`: values of the shape's adapters, which are new ones by the seed when not given. Raises
        ConfigError for a tensor that is missing, not known or of another size.
        """
        super().__init__(shape or folder.shape, seed, mlp_chunk, head_chunk, z_loss)
        self.folder, self.empty = folder, empty
        self.sources: dict[str, Source] = {}
        if not empty:
            self.sources = {**folder.sources, **(adapter.sources if adapter is not None else {})}
        self.tell: Callable[[int], None] = lambda elements: None
        """Called with the elements of each parameter that was read."""

    def part(self, part: Part) -> nn.Module:
        return self.part_for(part, Held(self.shape))

    def part_for(self, part: Part, held: Held) -> nn.Module:
        module = self.bare(part)
        sizes = held.local.parameters(part)
        for place, size in self.shape.parameters(part).items():
            name = self.shape.parameter_name(part, place)
            parameter = nn.Parameter(
                self._values(name, size, sizes[place], held), requires_grad=self.shape.trains(name)
            )
            put(module, place, parameter)
        return module

    def _values(self, name: str, size: tuple[int, ...], mine: tuple[int, ...], held: Held) -> Tensor:
        """Of a parameter of `size`, what this rank holds, `mine` of it; nothing where another rank owns it."""
        if not held.owns(name):
            return torch.empty(1).expand(mine)
        if self.empty:
            return torch.empty(mine)
        starts = [0 if whole == part else held.rank * part for whole, part in zip(size, mine, strict=True)]
        if (rows := slice_of(name)) is not None:
            starts[0] += rows.start
        spans = [(start, start + length) for start, length in zip(starts, mine, strict=True)]
        if (source := self.sources.get(whole_name(name))) is not None:
            values = read(source, spans)
        else:  # an adapter that is new
            whole = torch.empty(size)
            self._initialise(name, whole)
            values = whole[tuple(slice(*span) for span in spans)].clone()
        self.tell(values.numel())
        return values


def load(
    path: str | Path,
    mlp_chunk: int = 0,
    head_chunk: int = 0,
    z_loss: float = 0.0,
    adapter: str | Path | None = None,
    lora: Lora | None = None,
) -> Loaded:
    """The model in a Hugging Face folder, for `Pipeline`: config.json and safetensors, or files of torch.save.

    `adapter`: a folder of PEFT's with adapters on these weights; `lora`: new ones. With either, all else is frozen. Weights
    are read when a rank asks for them. Raises ConfigError for what is wrong with a folder.
    """
    folder = Folder.open(path)
    if adapter is not None and lora is not None:
        raise ConfigError("lora: an adapter is given, which says what it is; leave one of them out")
    found = None if adapter is None else Adapter.open(adapter, folder)
    shape = replace(folder.shape, lora=lora if found is None else found.lora)
    return Loaded(folder, shape, mlp_chunk, head_chunk, z_loss, adapter=found)


def read(source: Source, spans: list[tuple[int, int]]) -> Tensor:
    """These rows, and columns, of a parameter, in float32 or wider. Raises ConfigError where they are not finite, or a
    tied table's twin is not the same.
    """
    stored, place, twin, key = source
    wide = torch.promote_types(getattr(torch, DTYPES[stored.dtype]), torch.float32)
    found = torch.empty([stop - start for start, stop in spans], dtype=wide)
    rows = (place.start + spans[0][0], place.start + spans[0][1])
    columns = spans[1] if len(spans) > 1 else None
    asked = Range(columns, rows) if place.transposed and columns is not None else Range(rows, columns)
    piece = read_range(stored, asked)
    found.copy_(piece.T if place.transposed else piece)
    del piece
    if found.numel() and not all(map(torch.isfinite, torch.aminmax(found))):
        raise ConfigError(f"{key}: {stored.file}: {stored.name} is not finite; give weights without nan and inf")
    if twin is not None:
        _check_same(found, asked, stored, twin)
    return found


def _check_same(table: Tensor, asked: Range, stored: Stored, twin: Stored) -> None:
    """A file may hold a tied head's table a second time, and then holds the same."""
    for start in range(0, table.shape[0], ROWS):
        mine = table[start : start + ROWS]
        first = asked.rows[0] + start
        other = read_range(twin, Range((first, first + mine.shape[0]), asked.columns))
        if not torch.equal(mine, other.to(mine.dtype)):
            raise ConfigError(
                f"model.path: {twin.file}: {twin.name} is not {stored.name}, and tie_word_embeddings says that it is; "
                "set it to false, or leave the tensor out"
            )


def read_range(stored: Stored, asked: Range) -> Tensor:
    """A part of a tensor in a file, which is open no longer than this takes, or than the part is used."""
    if stored.file.suffix != ".safetensors":
        return asked.of(opened(stored.file)[stored.name])
    try:
        with safe_open(stored.file, framework="pt") as file:
            return asked.of(file.get_slice(stored.name))
    except (SafetensorError, OSError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"model.path: {stored.file}: {stored.name} cannot be read: {said}; fetch it again") from None
