"""TensorDivided: a module whose matrices tensor-parallel ranks divide (see `runtime.tensor`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from helixpipe.model.linear import same

Exchange = Callable[[Tensor], Tensor]


class TensorDivided(nn.Module):
    gather: Exchange = staticmethod(same)
    """From this rank's tokens to those of all ranks that divide its matrices."""

    def divide(self, gather: Exchange, scatter: Exchange) -> None:
        """Gather what comes in; a module that divides what a matrix reads scatters what comes out."""
        self.gather = gather
