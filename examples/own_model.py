"""A model of your own, trained on two local ranks: `python examples/own_model.py`. torchrun starts the same file."""

from pathlib import Path

import torch
from torch import Tensor, nn

import helixpipe as hp


class Recurrent(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.rnn = nn.RMSNorm(hidden), nn.GRU(hidden, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rnn(self.norm(x))[0]


def main() -> None:
    torch.manual_seed(0)  # every rank makes the same modules and draws the same batches
    model = hp.Layers(nn.Embedding(256, 64), [Recurrent(64) for _ in range(4)], nn.Linear(64, 256))
    pipeline = hp.Pipeline(model, hp.build_schedule("1f1b", ranks=2, model=model, microbatches=4))
    optimizer = torch.optim.AdamW(pipeline.parameters.values(), lr=3e-3)
    windows = torch.tensor(list(Path(__file__).read_bytes())).unfold(0, 33, 1)
    for step in range(41):
        rows = windows[torch.randint(len(windows), (16,))]
        pipeline.zero_gradients()
        loss = pipeline.step(rows[:, :-1], rows[:, 1:])
        optimizer.step()
        if pipeline.rank == 0 and step % 10 == 0:
            print(f"step {step}  loss {loss:.3f}")


if __name__ == "__main__":
    hp.launch(main, ranks=2)
