"""A vocabulary that is spread over all ranks: loss to 1e-12 and every gradient to 1e-9 of plain autograd, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from coverings import covering
from oracle import batch, plain_step
from ranks import Ranks, mesh_of
from spreading import spread

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.slices import slice_of
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.check import check
from helixpipe.schedule.families import FAMILIES, build_schedule, options
from helixpipe.schedule.schedule import Schedule

LENGTHS = {1: (12,), 3: (6, 1, 5)}
PER_RANK = {"zb_v": 2, "v_half": 2, "v_min": 2, "dualpipe_v": 2}


@dataclass(frozen=True)
class Case:
    family: str
    ranks: int
    segments: int = 1
    tied: bool = False
    chunk: int = 0
    recompute: str = "selective"
    shards: int = 0
    moved: int = 0
    puts_off: bool = False
    one_word: int | None = None
    """The target of all tokens of the first sequence, where it is one."""

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        more = ""
        more += (
            "-by hand" * self.puts_off
            + f"-shards{self.shards}" * (self.shards > 0)
            + f"-moved{self.moved}" * (self.moved > 0)
        )
        more += "" if self.one_word is None else f"-all{self.one_word}"
        return f"{self.family}-p{self.ranks}-k{self.segments}-{tied}-chunk{self.chunk}-{self.recompute}{more}"

    @property
    def shape(self) -> ModelShape:
        given = self.given.get("stages_per_rank", PER_RANK.get(self.family, 1))
        layers = max(2, self.ranks * given)
        return ModelShape(layers=layers, hidden=16, heads=4, kv_heads=2, ffn=24, vocabulary=19, tied=self.tied)

    @property
    def given(self) -> dict[str, Any]:
        known = options(self.family)
        found: dict[str, Any] = {"segments": self.segments} if "segments" in known else {}
        return found | ({"stages_per_rank": 2} if "stages_per_rank" in known else {})

    @property
    def schedule(self) -> Schedule:
        """By hand where shards are elsewhere, or more, than the library's, or put weight gradients off."""
        sizes = {"ranks": self.ranks, "layers": self.shape.layers, "microbatches": self.microbatches}
        if not self.shards and not self.moved and not self.puts_off:
            return build_schedule(self.family, vocabulary="spread", **sizes, **self.given)
        found = spread(build_schedule(self.family, **sizes, **self.given), self.shards, self.moved)
        check(found)
        return found

    @property
    def microbatches(self) -> int:
        return max(4, 2 * self.ranks) if self.family == "dualpipe_v" else 3 if self.segments == 3 else 4

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, targets = batch(self.shape, self.microbatches, 12)
        if self.one_word is not None:
            targets[0] = self.one_word
        return tokens, targets


def run_case(case: Case) -> tuple[float, float, dict[str, torch.Tensor]] | None:
    mesh = mesh_of(case.ranks)
    if mesh is None:
        return None
    shape = case.shape
    pipeline = Pipeline(
        Decoder(shape, head_chunk=case.chunk), case.schedule, mesh, dtype=torch.float64, recompute=case.recompute,
        timeout_s=30, segment_lengths=LENGTHS[case.segments],
    )  # fmt: skip
    tokens, targets = case.batch()
    loss = pipeline.step(tokens, targets)
    assert pipeline._ledger.bytes == 0
    evaluated = pipeline.losses(tokens, targets)
    assert not evaluated.without
    pipeline.close()
    return loss, evaluated.mean, {name: p.grad for name, p in pipeline.parameters.items() if p.grad is not None}


def holds(four_ranks: Ranks, case: Case) -> None:
    loss, gradients = plain_step(case.shape, *case.batch())
    found: dict[str, torch.Tensor] = {}
    for result in four_ranks.run(run_case, case)[: case.ranks]:
        assert abs(result[0] - loss) < 1e-12
        assert abs(result[1] - loss) < 1e-12
        assert not found.keys() & result[2].keys()
        found |= result[2]
    check_gradients(joined(found), gradients)


def joined(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Slices of one parameter as that parameter, each row from one of them."""
    whole = {name: gradient for name, gradient in found.items() if slice_of(name) is None}
    slices = sorted((mine, name) for name in found if (mine := slice_of(name)) is not None)
    for name, each in itertools.groupby(slices, key=lambda pair: pair[0].name):
        pieces = list(each)
        ends = [0, *(mine.stop for mine, _ in pieces)]
        assert [mine.start for mine, _ in pieces] == ends[:-1]
        assert ends[-1] == pieces[0][0].rows
        whole[name] = torch.cat([found[full] for _, full in pieces])
    return whole


def check_gradients(found: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm()
        assert error <= 1e-9 * gradient.norm(), f"{name}: {error:.1e}"


def product() -> Iterator[Case]:
    for family, ranks, tied, chunk in itertools.product(FAMILIES, (1, 2, 3, 4), (False, True), (0, 5)):
        for segments, recompute in itertools.product((1, 3), ("none", "full", "selective")):
            if segments == 1 or "segments" in options(family):
                yield Case(family, ranks, segments, tied, chunk, recompute)


def meetings(case: Case) -> list[Hashable]:
    """Every family on more than one rank, whole and in segments; everything else once with each other thing."""
    found: list[Hashable] = [(case.ranks, case.tied), (case.ranks, case.chunk > 0), (case.recompute, case.chunk > 0)]
    found += [(case.recompute, case.segments), (case.tied, case.recompute), (case.tied, case.chunk > 0, case.segments)]
    return found + ([(case.family, case.segments)] if case.ranks > 1 else [])


# all targets of a sequence in one shard, or ignored; more shards than ranks, and shards of head and table on two ranks
ODD = [
    Case("1f1b", 3, one_word=0), Case("seq1f1b", 2, 3, True, 5, "full", one_word=18), Case("1f1b", 2, one_word=-100),
    Case("1f1b", 2, 1, True, shards=5), Case("zb_h1", 3, 1, True, 5, "none", moved=1), Case("helix", 4, moved=2, tied=True),
    Case("1f1b", 1, shards=19), Case("zb_h1", 2, 1, True, puts_off=True), Case("seq1f1b_zb", 3, 3, puts_off=True, recompute="full"),
]  # fmt: skip


@pytest.mark.parametrize("case", [*covering(product(), meetings), *ODD], ids=str)
def test_gradients(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_full_product(four_ranks: Ranks, family: str) -> None:
    """`make test-full`."""
    for case in product():
        if case.family == family:
            holds(four_ranks, case)
