"""Checkpoints move between meshes: whoever loads gets the weights and moments that others made, bit by bit."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import batch
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from helixpipe.config import Config
from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule
from helixpipe.train import manifest
from helixpipe.train.checkpoint import Checkpoints
from helixpipe.train.optimizer import Optimizer

SHAPE = ModelShape(layers=4, hidden=16, heads=4, kv_heads=4, ffn=32, vocabulary=17, tied=True, bias=True, qkv_bias=True)
MESHES = {
    "pp4": ("pp",), "pp2 dp2": ("pp", "dp"), "pp2 cp2": ("pp", "cp"), "pp2 tp2": ("pp", "tp"), "cp2 tp2": ("cp", "tp"),
}  # fmt: skip


@functools.cache
def device_mesh(name: str) -> DeviceMesh | None:
    names = MESHES[name]
    return None if len(names) == 1 else init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


SHARDED = {"pp2 dp2", "cp2 tp2"}
"""Whose optimizer state is divided over replicas."""


def optimizer_of(name: str, pipeline: Pipeline) -> Optimizer:
    shards = pipeline.shards() if name in SHARDED else None
    return Optimizer(pipeline.parameters, Config().train, pipeline.as_whole, shards)


def pipeline_of(name: str, seed: int) -> Pipeline:
    ranks = {"pp4": 4, "cp2 tp2": 1}.get(name, 2)
    schedule = build_schedule("1f1b", ranks=ranks, layers=4, microbatches=2)
    return Pipeline(Decoder(SHAPE, seed), schedule, device_mesh(name), timeout_s=30)


def saved(name: str, folder: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """On a rank: two steps on a mesh, and a checkpoint; what this rank put in, whole where it can be."""
    pipeline = pipeline_of(name, seed=1)
    optimizer = optimizer_of(name, pipeline)
    for step in range(2):
        pipeline.zero_gradients()
        pipeline.step(*batch(SHAPE, 4, 8, seed=step))
        optimizer.step(step)
    state = optimizer.state(2)
    pipeline.close()
    path = Checkpoints(Path(folder), 2, dist.group.WORLD).save(state, 2, Config())
    return path, {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}


def loaded(name: str, path: Path) -> dict[str, torch.Tensor]:
    """On a rank: what a run of another seed on another mesh has after loading."""
    pipeline = pipeline_of(name, seed=2)
    optimizer = optimizer_of(name, pipeline)
    state = optimizer.state(2)
    Checkpoints(path.parent, 2, dist.group.WORLD).load(path, state)
    own = {f"model.{key}": p.data for key, p in pipeline.parameters.items()}
    for key, tensor in own.items():  # the very memory that is trained on was filled
        local = state[key].to_local() if hasattr(state[key], "to_local") else state[key]
        assert torch.equal(local, tensor)
    pipeline.close()
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}


@functools.cache
def one_process(path: Path) -> dict[str, torch.Tensor]:
    """What a run of one process loads."""
    schedule = build_schedule("1f1b", ranks=1, layers=4, microbatches=2)
    pipeline = Pipeline(Decoder(SHAPE, 3), schedule)
    state = Optimizer(pipeline.parameters, Config().train, pipeline.as_whole).state(2)
    Checkpoints(path.parent, 2, None).load(path, state)
    pipeline.close()
    return state


@pytest.mark.parametrize(
    ("writer", "reader"), list(itertools.pairwise(["pp2 dp2", "pp2 tp2", "pp2 cp2", "cp2 tp2", "pp2 dp2"]))
)
def test_a_checkpoint_moves_between_meshes(four_ranks: Ranks, tmp_path: Path, writer: str, reader: str) -> None:
    everyone = four_ranks.run(saved, writer, str(tmp_path / "checkpoints"))
    path = everyone[0][0]
    wrote = {key: value for _, state in everyone for key, value in state.items()}
    assert manifest.verify(path).step == 2
    alone = one_process(path)
    assert alone.keys() == wrote.keys()
    for key, value in wrote.items():
        assert torch.equal(alone[key], value), key
    for name in (reader, "pp4"):
        got = {key: value for state in four_ranks.run(loaded, name, path) for key, value in state.items()}
        assert got.keys() == wrote.keys()
        for key, value in wrote.items():
            assert torch.equal(got[key], value), key


def test_replicas_are_written_once(four_ranks: Ranks, tmp_path: Path) -> None:
    sizes = set()
    for name in ("pp4", "pp2 dp2", "pp2 cp2"):
        path = four_ranks.run(saved, name, str(tmp_path / name))[0][0]
        sizes.add(sum(file.stat().st_size for file in path.glob("*.distcp")))
    assert len(sizes) == 1, sizes


def trained(sharded: bool) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """On a rank of pp 2 x dp 2: losses, weights and elements of optimizer state after four steps."""
    pipeline = pipeline_of("pp2 dp2", seed=1)
    shards = pipeline.shards() if sharded else None
    optimizer = Optimizer(pipeline.parameters, Config().train, pipeline.as_whole, shards)
    losses = []
    for step in range(4):
        pipeline.zero_gradients()
        losses.append(pipeline.step(*batch(SHAPE, 4, 8, seed=step)))
        optimizer.step(step)
    state = optimizer.state(4)
    pipeline.close()
    moments = sum(tensor.numel() for name, tensor in state.items() if name.startswith("optimizer."))
    return losses, {name: p.data for name, p in pipeline.parameters.items()}, moments


def test_shards_of_the_optimizer_change_no_bit_and_halve_its_state(four_ranks: Ranks) -> None:
    whole, sharded = four_ranks.run(trained, False), four_ranks.run(trained, True)
    for (losses, weights, moments), (same_losses, same_weights, fewer) in zip(whole, sharded, strict=True):
        assert losses == same_losses
        assert weights.keys() == same_weights.keys()
        assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
        assert fewer < 0.6 * moments
