"""Same: whether all ranks hold the same model, where each was handed its own."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from helixpipe.errors import ConfigError
from helixpipe.runtime.mesh import Mesh
from helixpipe.runtime.watch import Watch

if TYPE_CHECKING:
    from helixpipe.model.decoder import Model


def check_same(model: Model, mesh: Mesh, watch: Watch) -> None:
    """Raise ConfigError, on all ranks, where a part's values are not the same on all. Collective.

    Asks models that have `digests`: 32 bits a part, in one order. All others make their values by name, whoever asks.
    """
    if not hasattr(model, "digests"):
        return
    digests: dict[str, int] = model.digests()
    watch.doing = "the comparison of models"
    whole = zlib.crc32(repr(digests).encode())
    rows = mesh.gathered([float(len(digests)), float(whole)], watch)
    other = next((rank for rank, row in enumerate(rows) if row != rows[0]), None)
    if other is None:
        return
    if rows[other][0] != rows[0][0]:
        raise ConfigError(
            f"model: {rows[0][0]:.0f} parts on rank 0 and {rows[other][0]:.0f} on rank {other}; make the same model on every rank"
        )
    rows = mesh.gathered([float(digest) for digest in digests.values()], watch)
    place, other = next(
        (place, rank) for place in range(len(digests)) for rank, row in enumerate(rows) if row[place] != rows[0][place]
    )
    raise ConfigError(
        f"model: {list(digests)[place]} has other values on rank {other} than on rank 0; make its modules from one seed on every "
        "rank (torch.manual_seed before them), or load the same file"
    )
