"""What a pipeline finds out of a model when it is made: that parts can be called, that all ranks hold the same, how to cut."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from oracle import batch, plain_step
from ranks import Ranks, mesh_of
from torch import Tensor, nn

import helixpipe as hp
from helixpipe.parts.kind import KINDS
from helixpipe.parts.part import chain

SHAPE = hp.ModelShape(layers=2, hidden=16, heads=4, ffn=24, vocabulary=19)
SCHEDULE = hp.build_schedule("1f1b", ranks=1, layers=2, microbatches=2)


class Own:
    """A decoder with one part of somebody's own."""

    def __init__(self, kind: str, module: nn.Module) -> None:
        self.shape, self.kind, self.module = SHAPE, kind, module

    def part(self, part: hp.Part) -> nn.Module:
        return self.module if part.kind == self.kind else hp.Decoder(SHAPE).part(part)


class One(nn.Module):
    def forward(self, first: Tensor) -> Tensor:
        return first


class Two(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second


class Untold(nn.Module):
    """Its forward tells no signature: it is let through."""

    forward = staticmethod(torch.relu)


def refused(kind: str, module: nn.Module, opaque: tuple[int, ...] = ()) -> str:
    schedule = hp.build_schedule("1f1b", ranks=1, layers=2, microbatches=2, opaque=opaque)
    with pytest.raises(hp.ConfigError) as error:
        hp.Pipeline(Own(kind, module), schedule)
    return str(error.value)


CALLS = {
    "embed": "(tokens, start)", "norm": "(x)", "qkv": "(n, start)", "attn": "(q, k, v)", "proj": "(o, x)", "mlp": "(y)",
    "head": "(x, targets)", "block": "(x, start)",
}  # fmt: skip
OF_SHARDS = {
    "lookup": "(tokens)", "joined": "(e, start)", "final": "(x)", "logits": "(f, targets)", "loss": "(scores, targets)",
}  # fmt: skip


@pytest.mark.parametrize("kind", CALLS)
def test_a_part_that_cannot_be_called_is_refused_when_the_pipeline_is_made(kind: str) -> None:
    module = One() if len(CALLS[kind].split(",")) > 1 else Two()
    part = next(part for part in chain(2, (0,) if kind == "block" else ()) if part.kind == kind)
    told = refused(kind, module, (0,) if kind == "block" else ())
    wrong = "too many positional arguments" if isinstance(module, One) else "missing a required argument: 'second'"
    assert told == (
        f"{part}: {type(module).__name__} is called as {kind}{CALLS[kind]}, and its forward{inspect.signature(module.forward)} "
        f"does not take that ({wrong}); wrap it in a module that does, or give plain modules to hp.Layers"
    )


def test_every_kind_is_called_as_it_says() -> None:
    """With its own parts: what the tape does."""
    calls = CALLS | OF_SHARDS
    assert calls.keys() == KINDS.keys()
    for opaque, shards in (((), 0), ((0,), 0), ((), 2)):
        for part in chain(2, opaque, shards):
            assert f"({', '.join((*part.about.reads, *part.about.beside))})" == calls[part.kind]
            inspect.signature(hp.Decoder(SHAPE).part(part).forward).bind(*part.about.reads, *part.about.beside)


def test_attention_is_to_be_had() -> None:
    assert isinstance(hp.Decoder(SHAPE).part(hp.Part("attn", 0)), hp.Attention)
    assert hp.Pipeline(Own("norm", Untold()), SCHEDULE).parameters


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_segments_are_cut_as_training_cuts_them(recompute: str) -> None:
    """By equal computation, anew for every length; short sequences in finer steps."""
    schedule = hp.build_schedule("seq1f1b", ranks=1, layers=2, microbatches=2, segments=3)
    pipeline = hp.Pipeline(hp.Decoder(SHAPE), schedule, dtype=torch.float64, recompute=recompute)
    for length in (12, 1024):
        loss = pipeline.step(*batch(SHAPE, 2, length))
        assert abs(loss - plain_step(SHAPE, *batch(SHAPE, 2, length))[0]) < 1e-12
        if length == 1024:
            setting = hp.Setting(SHAPE, length, keeping=pipeline.keeping)
            assert pipeline.last_program.batches[0] == setting.batch(3)
    assert pipeline.program(hp.Batch(1, (5, 4, 3)))
    with pytest.raises(
        hp.ConfigError, match=r"^schedule\.segments: 3 segments of a sequence of 2 tokens; give at most 2$"
    ):
        pipeline.step(*batch(SHAPE, 2, 2))


def cut_over_two() -> tuple[int, ...] | None:
    from torch.distributed.device_mesh import DeviceMesh

    everyone = mesh_of(2)
    if everyone is None:
        return None
    schedule = hp.build_schedule("seq1f1b", ranks=1, layers=2, microbatches=2, segments=3)
    mesh = DeviceMesh.from_group([everyone.get_group()], "cpu", mesh=[0, 1], mesh_dim_names=("cp",))
    pipeline = hp.Pipeline(hp.Decoder(SHAPE), schedule, mesh, timeout_s=30)
    pipeline.step(*batch(SHAPE, 2, 52))
    pipeline.close()
    return pipeline.last_program.batches[0].segment_lengths


def test_segments_divide_over_the_ranks_that_share_them(four_ranks: Ranks) -> None:
    lengths = four_ranks.run(cut_over_two)[0]
    assert sum(lengths) == 52 / 2
    assert all(length % 2 == 0 for length in lengths), "zigzag wants quarters of the whole"


def run_with(seeds: tuple[int, int], layers: tuple[int, int]) -> str | None:
    """On two ranks, whose models come from these seeds: what is told, "" for nothing."""
    mesh = mesh_of(2)
    if mesh is None:
        return None
    rank = mesh.get_local_rank()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        embed = nn.Embedding(19, 16)
        torch.manual_seed(seeds[rank])
        model = hp.Layers(embed, [nn.Linear(16, 16) for _ in range(layers[rank])], nn.Linear(16, 19))
    schedule = hp.build_schedule("1f1b", ranks=2, model=model, microbatches=2)
    try:
        hp.Pipeline(model, schedule, mesh, timeout_s=30).close()
    except hp.ConfigError as error:
        return str(error)
    return ""


def test_ranks_with_other_values_are_told_so_on_every_rank(four_ranks: Ranks) -> None:
    assert four_ranks.run(run_with, (1, 1), (2, 2))[:2] == ["", ""]
    told = (
        "model: block.0 has other values on rank 1 than on rank 0; make its modules from one seed on every rank "
        "(torch.manual_seed before them), or load the same file"
    )
    assert four_ranks.run(run_with, (1, 2), (2, 2))[:2] == [told, told]
    told = "model: 4 parts on rank 0 and 5 on rank 1; make the same model on every rank"
    assert four_ranks.run(run_with, (1, 1), (2, 3))[:2] == [told, told]


def test_kinds_read_before_what_stands_beside() -> None:
    names = [(*kind.reads, *kind.beside) for kind in KINDS.values()]
    assert all(len(set(each)) == len(each) for each in names)
    assert set(itertools.chain(*(kind.beside for kind in KINDS.values()))) == {"tokens", "start", "targets"}
