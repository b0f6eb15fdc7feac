"""A model of your own, split by hand into parts. `python examples/own_parts.py` trains it on two local ranks.

A model that nobody has to look into is easier: see own_model.py. Here two things are asked of a model: a `shape`, from which
messages are computed, and `part`, which hands out a module for each part that a rank runs. It has layers of two kinds:

    layer 0, 2   opaque: one module from x to x, here a gated causal convolution. It is the part `block`.
    layer 1, 3   split as a decoder's, with the library's own parts.

Schedules that cut the chain only at x (1f1b, gpipe) run any mixture of the two; one of split layers alone runs under all.
docs/guide/own_parts.md has what each part is called with.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import helixpipe as hp

OPAQUE = (0, 2)
SHAPE = hp.ModelShape(layers=4, hidden=64, heads=4, ffn=128, vocabulary=256)


class Convolution(nn.Module):
    """Somebody's layer: x [b, s, h] -> x [b, s, h]. The pipeline never looks inside."""

    def __init__(self, hidden: int, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.mix = nn.Conv1d(hidden, 2 * hidden, width, groups=hidden)
        self.out = nn.Linear(hidden, hidden)
        self.width = width

    def forward(self, x: Tensor, start: int) -> Tensor:
        n = F.pad(self.norm(x).mT, (self.width - 1, 0))
        value, gate = self.mix(n).mT.chunk(2, -1)
        return x + self.out(value * F.silu(gate))  # type: ignore[no-any-return]


class OwnModel:
    """Hands out its parts; the same parameters whoever asks, since they are drawn from a seed of the part."""

    def __init__(self) -> None:
        self.shape = SHAPE
        self._decoder = hp.Decoder(SHAPE)

    def part(self, part: hp.Part) -> nn.Module:
        if part.kind != "block":
            return self._decoder.part(part)
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(str(part).encode()))
            return Convolution(SHAPE.hidden)


def main(steps: int) -> None:
    schedule = hp.build_schedule("1f1b", ranks=2, layers=SHAPE.layers, microbatches=4, opaque=OPAQUE)
    pipeline = hp.Pipeline(OwnModel(), schedule)
    optimizer = torch.optim.AdamW(pipeline.parameters.values(), lr=3e-3)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    for step in range(steps):
        starts = torch.randint(len(text) - 129, (4,), generator=torch.Generator().manual_seed(step)).tolist()
        rows = torch.stack([text[start : start + 129] for start in starts])
        pipeline.zero_gradients()
        loss = pipeline.step(rows[:, :-1], rows[:, 1:])
        optimizer.step()
        if pipeline.rank == 0 and step % 10 == 0:
            print(f"step {step}  loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    hp.launch(main, 41, ranks=2)
