"""The table train.lora: adapters beside frozen weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from helixpipe.errors import ConfigError
from helixpipe.parts.lora import Lora


@dataclass(frozen=True)
class LoraConfig:
    """Keys of `helixpipe.parts.lora.Lora`. With a rank everything but adapters is frozen."""

    rank: int | None = None
    """Size of an adapter: it is two matrices, [rank, in] and [out, rank]."""
    alpha: float | None = None
    """An adapter's product is multiplied by alpha / rank; the rank itself when unset."""
    targets: tuple[str, ...] | None = None
    """The linear layers that have one: some of q, k, v, o, gate, up, down; q, k, v, o when unset."""
    rslora: bool | None = None
    """Whether it is multiplied by alpha / sqrt(rank); false when unset."""

    def lora(self, of_adapter: Lora | None = None) -> Lora | None:
        """What the model has. `of_adapter`: of the adapter that training goes on with, which decides it. Raises ConfigError."""
        given = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        if of_adapter is not None:
            asked = dataclasses.replace(of_adapter, **given)
            for key in given:
                if (mine := getattr(asked, key)) != (theirs := getattr(of_adapter, key)):
                    raise ConfigError(
                        f"train.lora.{key}: {_shown(mine)}, and the adapter in model.adapter has {_shown(theirs)}; leave it out"
                    )
            return of_adapter
        if given and self.rank is None:
            raise ConfigError(
                f"train.lora.rank: unset, and train.lora.{next(iter(given))} is set; give a rank, such as 16"
            )
        return Lora(**given) if given else None


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
