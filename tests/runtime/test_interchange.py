"""Schedules to and from torch.distributed.pipelining: torch's orders on our runtime, ours on torch's, equal gradients."""

from __future__ import annotations

import csv
import functools
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, plain_step
from ranks import Ranks, mesh_of
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from helixpipe.errors import ScheduleError
from helixpipe.model.decoder import Decoder
from helixpipe.model.linear import Linear
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.check import check
from helixpipe.schedule.families import FAMILIES, build_schedule
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage
from helixpipe.schedule.text import from_csv
from helixpipe.schedule.torch_text import to_torch_csv

SHAPE = ModelShape(layers=8, hidden=8, heads=2, kv_heads=1, ffn=12, vocabulary=11)
LENGTH = 6
MICROBATCHES = 8
STAGES_PER_RANK = {
    "1F1B": 1, "GPipe": 1, "Interleaved1F1B": 2, "LoopedBFS": 2, "InterleavedZeroBubble": 2, "ZBVZeroBubble": 2,
    "DualPipeV": 2,
}  # fmt: skip


@functools.cache
def oracle() -> tuple[float, dict[str, Tensor]]:
    return plain_step(SHAPE, *batch(SHAPE, MICROBATCHES, LENGTH))


def equal(results: list[tuple[float | None, dict[str, Tensor]]]) -> None:
    """Each rank's loss (None where it has none) and gradients against plain autograd."""
    loss, gradients = oracle()
    losses = [found for found, _ in results if found is not None]
    assert losses
    assert max(abs(found - loss) for found in losses) < 1e-12
    found = {name: gradient for _, mine in results for name, gradient in mine.items()}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-9, f"{name}: {error:.1e}"


# torch's orders on our runtime


class StandIn:
    """As much of a torch stage as its schedules look at to write their order."""

    def __init__(self, index: int, ranks: int, stages: int) -> None:
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, stages, ranks, 0
        self.is_first = self.is_last = False
        self.submod = nn.Identity()


def exported(name: str, ranks: int, microbatches: int = MICROBATCHES) -> str:
    """The order of one of torch's own classes, as its `_dump_csv` writes it."""
    count = STAGES_PER_RANK[name]
    stages = [StandIn(index, ranks, ranks * count) for index in range(count)]
    schedule = get_schedule_class(name)(stages[0] if count == 1 else stages, microbatches, loss_fn=mean_loss)
    text = io.StringIO(newline="")
    csv.writer(text).writerows(schedule.pipeline_order.values())
    return text.getvalue()


def from_zero(text: str) -> str:
    """1F1B's order with the last rank's forwards counted from 0, as torch runs it."""
    *others, last = text.splitlines()
    if "F0" not in last:
        last = re.sub(r"F(\d+)", lambda match: f"F{int(match[1]) - 1}", last)
    return "\n".join([*others, last])


def run_on_ours(text: str, ranks: int, recompute: str) -> tuple[float, dict[str, Tensor]] | None:
    mesh = mesh_of(ranks)
    if mesh is None:
        return None
    schedule = from_csv(text, SHAPE.layers)
    pipeline = Pipeline(Decoder(SHAPE), schedule, mesh, dtype=torch.float64, recompute=recompute, timeout_s=30)
    loss = pipeline.step(*batch(SHAPE, MICROBATCHES, LENGTH))
    pipeline.close()
    return loss, {name: p.grad for name, p in pipeline.parameters.items()}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", STAGES_PER_RANK)
def test_torchs_orders_run_on_ours(four_ranks: Ranks, name: str, ranks: int) -> None:
    text = exported(name, ranks)
    if name == "1F1B":
        text = from_zero(text)
    recompute = ("none", "full", "selective")[len(name) % 3]
    equal(four_ranks.run(run_on_ours, text, ranks, recompute)[:ranks])


def test_torchs_orders_are_read_whole() -> None:
    """Every action torch wrote, idle cells and the reduction over replicas apart, and overlapped ones in their order."""
    for name in STAGES_PER_RANK:
        text = from_zero(exported(name, 4))
        schedule = from_csv(text, SHAPE.layers)
        check(schedule)
        for order, row in zip(schedule.ranks, text.splitlines(), strict=True):
            assert [str(action) for action in order] == re.findall(r"\d+[FBIW]\d+", row)


def test_the_order_that_torchs_1f1b_writes_is_refused_with_what_is_wrong() -> None:
    text = exported("1F1B", 2)
    if text == from_zero(text):
        pytest.skip("this torch counts the last rank's forwards from 0")
    with pytest.raises(ScheduleError, match="rank 1 has forwards from micro-batch 1 on and backwards from 0 on"):
        from_csv(text, SHAPE.layers)


# our orders on torch's runtime


class PlainStage(nn.Module):
    """The parts of a stage of whole layers as a plain module of torch's; the last stage ends in logits."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        decoder = Decoder(SHAPE)
        self.stage = stage
        self.parts = nn.ModuleDict({str(part).replace(".", "_"): decoder.part(part).double() for part in stage.parts})
        for module in self.modules():
            if isinstance(module, Linear):
                module.__class__ = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Any] = {"x": x}
        for part in self.stage.parts:
            module = self.parts[str(part).replace(".", "_")]
            if part.kind == "embed":
                values["x"] = module(values["x"], 0)
            elif part.kind == "norm":
                values["n"] = module(values["x"])
            elif part.kind == "qkv":
                values["qkv"] = module(values["n"], 0)
            elif part.kind == "attn":
                values["o"] = module(*values["qkv"])
            elif part.kind == "proj":
                values["y"] = module(values["o"], values["x"])
            elif part.kind == "mlp":
                values["x"] = module(values["y"])
            else:
                return module.output(module.norm(values["x"]))  # type: ignore[no-any-return]
        return values["x"]  # type: ignore[no-any-return]

    def gradients(self) -> dict[str, Tensor]:
        modules = zip(self.stage.parts, self.parts.values(), strict=True)
        return {SHAPE.parameter_name(part, name): p.grad for part, m in modules for name, p in m.named_parameters()}


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def run_on_torchs(schedule: Schedule, path: str) -> tuple[float | None, dict[str, Tensor]] | None:
    mesh = mesh_of(len(schedule.ranks))
    if mesh is None:
        return None
    group, rank, last = mesh.get_group(), mesh.get_local_rank(), len(schedule.stages) - 1
    mine = {s: PlainStage(stage) for s, stage in enumerate(schedule.stages) if schedule.owner(s) == rank}
    cpu = torch.device("cpu")
    stages = [PipelineStage(module, s, last + 1, cpu, group=group) for s, module in mine.items()]
    runtime = _PipelineScheduleRuntime(stages, schedule.microbatches, loss_fn=mean_loss)
    runtime._load_csv(path, format="compute_only")
    tokens, targets = batch(SHAPE, MICROBATCHES, LENGTH)
    losses: list[Tensor] = []
    inputs = (tokens,) if 0 in mine else ()
    runtime.step(*inputs, **({"target": targets, "losses": losses} if last in mine else {}))
    loss = float(torch.stack(losses).mean().detach()) if losses else None
    return loss, {name: gradient for module in mine.values() for name, gradient in module.gradients().items()}


TOLD = (
    "gpipe", "1f1b", "interleaved", "breadth_first", "zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "dualpipe_v", "constructed",
)  # fmt: skip
"""Families that torch's CSV can say; of these torch runs all."""
SEGMENTED = "torch has no segments; build the schedule with segments = 1, or write our own CSV"
UNTOLD = {
    "helix": "and a stage of torch's on one; use a family that keeps its stages in place",
    "terapipe": SEGMENTED,
    "seq1f1b": SEGMENTED,
    "seq1f1b_interleaved": SEGMENTED,
    "seq1f1b_zb": SEGMENTED,
    "slimpipe": SEGMENTED,
}


def built(family: str, ranks: int) -> Schedule:
    return build_schedule(family, ranks=ranks, layers=SHAPE.layers, microbatches=MICROBATCHES)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", TOLD)
def test_our_orders_run_on_torchs(four_ranks: Ranks, tmp_path: Path, family: str, ranks: int) -> None:
    schedule = built(family, ranks)
    path = tmp_path / "order.csv"
    path.write_text(to_torch_csv(schedule))
    assert from_csv(path.read_text(), SHAPE.layers) == schedule
    equal(four_ranks.run(run_on_torchs, schedule, str(path))[:ranks])


def test_every_family_can_be_told_or_not() -> None:
    assert set(FAMILIES) == {*TOLD, *UNTOLD}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", UNTOLD)
def test_what_torch_cannot_say_is_refused(family: str, ranks: int) -> None:
    with pytest.raises(ScheduleError) as error:
        to_torch_csv(built(family, ranks))
    assert UNTOLD[family] in str(error.value)
