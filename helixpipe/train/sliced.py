"""Sliced: rows of a parameter as torch.distributed.checkpoint sees them, under the name of the whole.

    embed.tokens.weight[0:500/1000]       ──┐
    embed.tokens.weight[500:1000/1000]    ──┴──►  embed.tokens.weight [1000, h], written and read in pieces

A DTensor cannot say so: its pieces are of one size, on the ranks of a mesh. So a run with its vocabulary spread loads what one
with a whole head saved, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from helixpipe.parts.slices import slice_of


class _Pieces(Tensor):
    """What is here of a tensor of `size`: rows, by the first one's number. torch asks it by the three methods below."""

    pieces: dict[int, Tensor]

    @staticmethod
    def __new__(cls, size: torch.Size, pieces: dict[int, Tensor]) -> Self:
        like = next(iter(pieces.values()))
        found: Self = Tensor._make_wrapper_subclass(
            cls, size, dtype=like.dtype, device=like.device, requires_grad=False
        )
        found.pieces = pieces
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuses: a checkpoint asks for pieces, and nobody may compute with a whole that is not here."""
        raise NotImplementedError(f"{func} of a tensor of which some rows alone are here")

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(piece), self.size()),
            )
            for chunk, piece in zip(self.__create_chunk_list__(), self.pieces.values(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        columns = len(self.size()) - 1
        return [
            ChunkStorageMetadata(torch.Size((start, *(0,) * columns)), piece.size())
            for start, piece in self.pieces.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[index.offset[0]]


def under_whole_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, on the same memory: slices of one parameter, or of its moments, under one name.

    A single number is that of the whole: all slices were updated as often. A rank has one slice of a parameter.
    """
    found: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    sizes: dict[str, torch.Size] = {}
    for name, tensor in state.items():
        mine = slice_of(name)
        if mine is None or not tensor.dim():
            found[name if mine is None else mine.name] = tensor
            continue
        pieces.setdefault(mine.name, {})[mine.start] = tensor
        sizes[mine.name] = torch.Size((mine.rows, *tensor.shape[1:]))
    return found | {name: _Pieces(sizes[name], each) for name, each in pieces.items()}
