"""Checkpoints and folders of a spread vocabulary: what a whole one wrote, and the other way round, bit by bit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import batch
from ranks import Ranks, mesh_of
from spreading import spread
from test_mesh_checkpoint import device_mesh

from helixpipe.config import Config
from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.slices import slice_of
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule
from helixpipe.train import manifest
from helixpipe.train.checkpoint import Checkpoints
from helixpipe.train.optimizer import Optimizer
from helixpipe.train.saver import DefaultStager, StagingOptions  # as `Saver` copies a state
from helixpipe.train.sliced import under_whole_names

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """Ranks of a pipeline, replicas that divide the optimizer, and shards: 0 is a whole head."""

    ranks: int
    dp: int = 1
    shards: int = 0
    tied: bool = True

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            layers=4, hidden=16, heads=4, ffn=32, vocabulary=17, tied=self.tied, bias=True, head_transform=True
        )


WHOLE, THREE, TWO, HALVES = Layout(4), Layout(3, 1, 3), Layout(2, 2, 2), Layout(4, 1, 4)


def made(layout: Layout, seed: int) -> tuple[Pipeline, Optimizer] | None:
    mesh = device_mesh("pp2 dp2") if layout.dp == 2 else mesh_of(layout.ranks)
    if mesh is None:
        return None
    schedule = build_schedule("1f1b", ranks=layout.ranks, layers=4, microbatches=2)
    schedule = spread(schedule, layout.shards) if layout.shards else schedule
    pipeline = Pipeline(Decoder(layout.shape, seed), schedule, mesh, timeout_s=30)
    shards = pipeline.shards() if layout.dp == 2 else None
    return pipeline, Optimizer(pipeline.parameters, Config().train, pipeline.as_whole, shards)


def steps(pipeline: Pipeline, optimizer: Optimizer, shape: ModelShape, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        pipeline.zero_gradients()
        losses.append(pipeline.step(*batch(shape, 4, 8, seed=step)))
        pipeline.clip_gradients(0.5)
        optimizer.step(step)
    return losses


def saved(layout: Layout, folder: str) -> tuple[Path, State, list[float]]:
    """On a rank: two steps, a checkpoint of a copy as training takes it, two more steps: what was saved, and the losses."""
    run = made(layout, seed=1)
    state: State = {}
    if run is not None:
        losses = steps(*run, layout.shape, 0, 2)
        copy = DefaultStager(StagingOptions(False, False, False, False)).stage(run[1].state(2))
        assert isinstance(copy, dict)
        state = copy
        losses += steps(*run, layout.shape, 2, 2)
        run[0].close()
    path = Checkpoints(Path(folder), 2, dist.group.WORLD).save(state, 2, Config())
    return path, state, losses if run is not None else []


def loaded(layout: Layout, path: Path) -> tuple[State, list[float]]:
    """On a rank: what a run of another seed has after loading, and the losses of two more steps."""
    run = made(layout, seed=2)
    state = {} if run is None else run[1].state(2)
    Checkpoints(path.parent, 2, dist.group.WORLD).load(path, state)
    if run is None:
        return {}, []
    copy = {name: tensor.clone() for name, tensor in state.items()}
    losses = steps(*run, layout.shape, 2, 2)
    run[0].close()
    return copy, losses


def joined(states: list[State]) -> State:
    """Of all ranks, slices as what they are slices of."""
    every = {name: tensor for state in states for name, tensor in state.items()}
    found = {name: tensor for name, tensor in every.items() if slice_of(name) is None}
    slices = sorted((mine, name) for name in every if (mine := slice_of(name)) is not None)
    for name, each in itertools.groupby(slices, key=lambda pair: pair[0].name):
        pieces = [every[full] for _, full in each]
        if not pieces[0].dim():  # how often it was updated
            assert len({piece.item() for piece in pieces}) == 1
        found[name] = torch.cat(pieces) if pieces[0].dim() else pieces[0]
    return found


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("writer", "reader"), list(itertools.pairwise([WHOLE, THREE, TWO, HALVES, WHOLE])), ids=lambda layout: str(layout)
)
def test_a_checkpoint_moves_between_whole_and_spread(
    four_ranks: Ranks, tmp_path: Path, writer: Layout, reader: Layout
) -> None:
    everyone = four_ranks.run(saved, writer, str(tmp_path / "checkpoints"))
    path = everyone[0][0]
    assert manifest.verify(path).step == 2
    wrote = joined([state for _, state, _ in everyone])
    got = four_ranks.run(loaded, reader, path)
    assert same(joined([state for state, _ in got]), wrote)
    assert got[0][1] == pytest.approx(everyone[0][2][2:], abs=1e-5), "the run goes on"
    again = four_ranks.run(loaded, writer, path)
    assert again[0][1] == everyone[0][2][2:], "an interruption changes no bit"


def test_initial_values_are_those_of_the_whole(four_ranks: Ranks) -> None:
    for tied in (True, False):
        states = [four_ranks.run(_initial, Layout(4, 1, shards, tied)) for shards in (0, 4)]
        assert same(*map(joined, states))


def _initial(layout: Layout) -> State:
    run = made(layout, seed=3)
    assert run is not None
    run[0].close()
    return {name: parameter.data for name, parameter in run[0].parameters.items()}


def test_nobody_computes_with_some_rows_of_a_whole() -> None:
    whole = under_whole_names({"head.output.weight[0:1/2]": torch.ones(1, 3)})["head.output.weight"]
    assert whole.shape == (2, 3)
    with pytest.raises(NotImplementedError, match="of a tensor of which some rows alone are here"):
        whole + 1
