"""What a mesh cannot do is refused on every rank before a step, and a rank lost inside a part is named."""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import batch
from ranks import CONTEXT, Ranks
from test_mesh import device_mesh, sized
from torch import Tensor, nn

from helixpipe.errors import ConfigError, RankError
from helixpipe.mesh import MeshShape
from helixpipe.model.decoder import Decoder
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.ledger import Ledger
from helixpipe.runtime.mesh import make_device_mesh
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=2, hidden=16, heads=2, ffn=32, vocabulary=17)


class OwnAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.flatten(2)


class OwnModel(Decoder):
    def part(self, part: Part) -> nn.Module:
        return OwnAttention() if part.kind == "attn" else super().part(part)


class OwnMLP(nn.Module):
    """The names and shapes of the library's, and no gather or scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(SHAPE.hidden)
        self.gate, self.up = (nn.Linear(SHAPE.hidden, SHAPE.ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(SHAPE.ffn, SHAPE.hidden, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        n = self.norm(y)
        return y + self.down(self.gate(n) * self.up(n))


class OtherMLP(Decoder):
    def part(self, part: Part) -> nn.Module:
        return OwnMLP() if part.kind == "mlp" else super().part(part)


class OpaqueLayers(Decoder):
    def part(self, part: Part) -> nn.Module:
        return nn.Linear(16, 16) if part.kind == "block" else super().part(part)


class OwnShape(ModelShape):
    pass


def refused(what: str) -> str:
    """On a rank: what is said."""
    schedule = build_schedule("1f1b", ranks=2, layers=2, microbatches=2)
    sizes, model, more = sized(pp=2, cp=2), Decoder(SHAPE), {}
    length, sequences = 8, 2
    match what:
        case "name":
            sizes = sized(pp=2, ep=2)
        case "ranks":
            sizes = sized(pp=4)
        case "attention":
            model = OwnModel(SHAPE)
        case "attention of segments":
            sizes, model = sized(pp=2, dp=2), OwnModel(SHAPE)
            schedule = build_schedule("seq1f1b", ranks=2, layers=2, microbatches=2, segments=2)
            more = {"segment_lengths": (4, 4)}
        case "recompute":
            more = {"recompute": "half"}
        case "shape":
            sizes, model = sized(pp=2, tp=2), Decoder(OwnShape(2, 16, 2, 32, 17))
        case "mlp":
            sizes, model = sized(pp=2, tp=2), OtherMLP(SHAPE)
        case "block":
            sizes, model = sized(pp=2, tp=2), OpaqueLayers(SHAPE)
            schedule = build_schedule("1f1b", ranks=2, layers=2, microbatches=2, opaque=(0, 1))
        case "heads":
            sizes, schedule = sized(tp=4), build_schedule("1f1b", ranks=1, layers=2, microbatches=2)
        case "method":
            more = {"context_method": "star"}
        case "length":
            length = 10
        case "batch":
            sizes = sized(pp=2, dp=2)
    try:
        pipeline = Pipeline(model, schedule, device_mesh(sizes), timeout_s=30, **more)
        try:
            pipeline.step(*batch(SHAPE, sequences, length))
        finally:
            pipeline.close()
    except ConfigError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("name", "mesh: dimension 'ep' is not known; name them pp, dp, cp, tp, as few as you need (mesh_dim_names)"),
        ("ranks", "schedule.ranks: the schedule has 2 ranks and 4 are running; start as many"),
        (
            "attention",
            "mesh.cp: the attention inside attn.{layer} is OwnAttention's own and cannot be spread over ranks; use cp 1, or "
            "helixpipe.Attention in it",
        ),
        (
            "attention of segments",
            "schedule.segments: attn.{layer} is OwnAttention, which is not handed the keys and values of earlier segments; "
            "use helixpipe.Attention, or segments = 1",
        ),
        ("recompute", "runtime.recompute: 'half' is not known; known: none, full, selective"),
        (
            "shape",
            "mesh.tp: 2; the parts of OwnShape cannot be divided, a ModelShape's can: use tp 1, and cp or dp in its place",
        ),
        (
            "mlp",
            "mesh.tp: 2; mlp.{layer} is OwnMLP, whose gate.weight cannot be divided; "
            "use tp 1, or QKV, Proj and MLP of helixpipe.model in it",
        ),
        (
            "block",
            "mesh.tp: 2; block.{layer} is Linear, whose qkv.q.weight cannot be divided; "
            "use tp 1, or QKV, Proj and MLP of helixpipe.model in it",
        ),
        ("heads", "mesh.tp: 4 ranks do not divide model.heads 2; tp may be 1 or 2"),
        ("method", "mesh.context_method: 'star' is not known; known: ring, ulysses"),
        (
            "length",
            "train.sequence_length: 10 tokens do not divide for ring over cp 2, tp 1, whose zigzag layout needs a multiple "
            "of 4; use 8 or 12",
        ),
        ("batch", "tokens: 2 sequences do not divide into 2 micro-batches on each of 2 dp ranks"),
        ("nothing", "taken"),
    ],
)
def test_on_every_rank_one_line(four_ranks: Ranks, what: str, message: str) -> None:
    for rank, said in enumerate(four_ranks.run(refused, what)):
        assert said == message.replace("{layer}", str(rank // 2))


def _rank(rank: int, port: int, axis: str, fate: str, results: Any) -> None:
    """Rank 1 meets its fate in its second step; what rank 0 says."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    schedule = build_schedule("1f1b", ranks=1, layers=2, microbatches=2)
    mesh = make_device_mesh(MeshShape(**{axis: 2}), "cpu", timeout_s=4)
    pipeline = Pipeline(Decoder(SHAPE), schedule, mesh, timeout_s=4)
    data = batch(SHAPE, 4, 8)
    pipeline.step(*data)
    if rank == 1:
        doing = Ledger.reset_high

        def doomed(self: Ledger) -> None:
            doing(self)
            if fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

        Ledger.reset_high = doomed  # type: ignore[method-assign]
    begun = time.monotonic()
    try:
        pipeline.step(*data)
        results.put(("no error", 0.0))
    except RankError as error:
        results.put((str(error), time.monotonic() - begun))


SAID = {
    "cp": r"action 0F0, rank 0 of 2 got no keys and values from rank 1, after \d s: .*",
    "tp": r"action 0F0, lost a rank that divides the same matrices \(tp, 2 ranks\)",
    "dp": r"the sum of gradients, lost a rank that has the same parameters",
}


@pytest.mark.parametrize(("axis", "fate"), [("cp", "silent"), ("tp", "killed"), ("dp", "killed")])
def test_a_rank_that_dies_or_is_silent_in_a_part_is_named(axis: str, fate: str) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=_rank, args=(rank, store.port, axis, fate, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        message, took_s = results.get(timeout=90)
    finally:
        for process in processes:
            process.kill()
            process.join(10)
    assert took_s < 15
    assert re.fullmatch(rf"rank 0, at {SAID[axis]}; rank 1 was last heard of \d+ s ago, at .*", message), message
