"""An order for each step's own documents: gradients are plain autograd's, every rank has the same, and a run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import batch
from packing import LENGTH, PACKINGS, assert_equal, packed_step
from ranks import Ranks, mesh_of
from test_freezing import state

import helixpipe as hp
from helixpipe.cli import main
from helixpipe.config import Config
from helixpipe.config_text import build_config
from helixpipe.train.job import prepare
from helixpipe.train.loop import train
from helixpipe.train.stop import Stop

SIZES = {"layers": 4, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn": 24}
DOCUMENTS = PACKINGS["ones"][:4]
CASES: list[dict[str, Any]] = [
    {"placement": "v", "stages_per_rank": 2},
    {"placement": "looped", "stages_per_rank": 2, "segments": 2},
]


def config(ranks: int = 2, **schedule: Any) -> Config:
    own = {"family": "constructed", "ranks": ranks, "microbatches": 4, "segment_multiple": 4, **schedule}
    return build_config({"model": SIZES, "train": {"sequence_length": LENGTH}, "schedule": own})


def run_documents(given: dict[str, Any]) -> Any:
    """On a rank: loss, gradients, the step's orders and those without documents."""
    mesh = mesh_of(2)
    if mesh is None:
        return None
    asked = config(**given)
    schedule, shape, setting = asked.build_schedule(), asked.shape(), asked.setting()
    pipeline = hp.Pipeline(
        hp.Decoder(shape), schedule, mesh, dtype=torch.float64, timeout_s=30, arrange=asked.order_of_steps(schedule),
        segment_lengths=lambda length, documents: setting.segment_lengths(schedule.segments, documents),
    )  # fmt: skip
    data = batch(shape, 4, LENGTH)
    pipeline.prepare(4, LENGTH, DOCUMENTS)
    loss = pipeline.step(*data, documents=DOCUMENTS)
    orders = pipeline.last_program.schedule.ranks
    gradients = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    pipeline.evaluate(*data)
    assert pipeline.last_program.schedule == schedule.forward_only()
    pipeline.close()
    return loss, gradients, orders, schedule.ranks


@pytest.mark.parametrize("given", CASES, ids=lambda given: given["placement"])
def test_gradients_and_one_order_on_all_ranks(four_ranks: Ranks, given: dict[str, Any]) -> None:
    found = [each for each in four_ranks.run(run_documents, given) if each is not None]
    shape = config(**given).shape()
    loss, gradients = packed_step(shape, *batch(shape, 4, LENGTH), DOCUMENTS)
    (_, _, orders, usual), other = found
    assert orders != usual
    assert orders == other[2]
    assert all(abs(each[0] - loss) < 1e-12 for each in found)
    assert_equal(found[0][1] | found[1][1], gradients)


TRAINING = """
--schedule.family constructed --schedule.placement v --schedule.stages_per_rank 2 --schedule.ranks 2 --schedule.microbatches 6
--mesh.dp 2 --model.layers 4 --model.hidden 16 --model.heads 2 --model.ffn 16 --train.sequence_length 256 --train.steps 4 --train.warmup_steps 0
--train.schedule wsd --train.decay_steps 2 --train.evaluate_sequences 2 --run.checkpoint_every 2 --run.timeline_step 3
--data.packing documents --runtime.device cpu
"""


def run_training(words: list[str]) -> None:
    """On a rank."""
    train(prepare(words, lambda line: None), "cpu", dist.group.WORLD, Stop())


def test_a_run_over_documents_goes_on_bit_for_bit_and_is_compared_with_its_own_order(
    four_ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of two replicas has orders of its own."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):
        (text / f"{number:02}.txt").write_text("ab" * (1 + number**2 % 211))

    def run(name: str, *more: str) -> dict[str, torch.Tensor]:
        words = [*TRAINING.split(), "--data.path", str(text), "--run.folder", str(tmp_path / name), *more]
        four_ranks.run(run_training, words)
        return state(tmp_path / name / "checkpoints/step-00000004")

    one = run("run")
    two = run("again", "--resume", str(tmp_path / "run/checkpoints/step-00000002"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)

    assert main(["compare", str(tmp_path / "run")]) == 0
    capsys.readouterr()
