"""Buffers of modules: where a stage visits they are the owner's, a forward changes them once, and each keeps its precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import batch
from others import MLP, SIZES, Listing, Others, Plain, equal
from ranks import Ranks, mesh_of
from test_mesh import device_mesh
from torch import Tensor, nn

import helixpipe as hp
from helixpipe.config import Config
from helixpipe.train.checkpoint import Checkpoints
from helixpipe.train.optimizer import Optimizer

Named = dict[str, Tensor]


class Scaled(nn.Module):
    """Scales what a module reads by a table that everyone has made otherwise."""

    def __init__(self, inner: nn.Module, rank: int) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("scale", torch.full((8,), 1.0 + rank, dtype=torch.float64))
        self.register_buffer("passing", torch.arange(8) + rank, persistent=False)

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.inner(x * (self.scale + self.passing).to(x.dtype), *more)


class ScaledShape(Listing):
    def parameters(self, part: hp.Part) -> dict[str, tuple[int, ...]]:
        found = super().parameters(part)
        return {f"inner.{name}": size for name, size in found.items()} if part.kind in ("norm", "qkv") else found


def scaled(rank: int, dtype: torch.dtype = torch.float64) -> Others:
    def change(part: hp.Part, module: nn.Module) -> nn.Module:
        return Scaled(module, rank) if part.kind in ("norm", "qkv") else module

    return Others(ScaledShape(**SIZES), change, dtype=dtype)


def values(name: str, step: int) -> Tensor:
    return torch.linspace(0.5, 1.5, 8, dtype=torch.float64) * (1 + step + sum(map(ord, name)) % 7)


def run_visited(recompute: str) -> list[tuple[float, Named]] | None:
    """On a rank: three steps, before the first and the last of which owners' buffers are written to."""
    mesh = mesh_of(2)
    if mesh is None:
        return None
    model = scaled(dist.get_rank())
    schedule = hp.build_schedule("helix", ranks=2, layers=3, microbatches=2, travel="attention")
    pipeline = hp.Pipeline(model, schedule, mesh, dtype=torch.float64, recompute=recompute, timeout_s=30)
    for module in pipeline._buffers._modules.owned.values():
        if isinstance(module, Scaled):
            module.passing.zero_()
    found = []
    for step in range(3):
        if step != 1:
            for name, buffer in pipeline.buffers().items():
                buffer.copy_(values(name, step))
        pipeline.zero_gradients()
        loss = pipeline.step(*batch(model.shape, 2, 8))
        found.append((loss, {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}))
    assert set(pipeline.buffers()) <= {f"layers.{i}.{kind}.scale" for i in range(3) for kind in ("norm", "qkv")}
    pipeline.close()
    return found


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_visited_rank_has_the_owners_buffers(four_ranks: Ranks, recompute: str) -> None:
    everyone = four_ranks.run(run_visited, recompute)[:2]
    for step, written in enumerate((0, 0, 2)):
        plain = Plain(scaled(0))
        for part, module in plain.parts.items():
            if isinstance(module, Scaled):
                module.scale.copy_(values(plain.shape.parameter_name(part, "scale"), written))
                module.passing.zero_()
        loss = plain.step(*batch(plain.shape, 2, 8))
        found: dict[str, Tensor | None] = {}
        for steps in everyone:
            assert abs(steps[step][0] - loss) < 1e-12
            found |= steps[step][1]
        equal({name: p.grad for name, p in plain.parameters.items()}, found)


def test_buffers_keep_their_precision_and_are_no_activations() -> None:
    """A run in bfloat16 would leave 3 digits of a rotary table or of running statistics."""
    model = scaled(0, torch.bfloat16)
    schedule = hp.build_schedule("1f1b", ranks=1, layers=3, microbatches=2)
    pipeline = hp.Pipeline(model, schedule, dtype=torch.bfloat16)
    scales = [
        inner.scale for m in pipeline._weights.modules.values() for inner in m.modules() if isinstance(inner, Scaled)
    ]
    assert {scale.dtype for scale in scales} == {torch.bfloat16}  # as they were handed over
    for name, buffer in pipeline.buffers().items():
        buffer.data = values(name, 0)
    pipeline.step(*batch(model.shape, 2, 8))
    assert {buffer.dtype for buffer in pipeline.buffers().values()} == {torch.float64}
    assert all(pipeline._weights.is_parameter(b.untyped_storage().data_ptr()) for b in pipeline.buffers().values())
    masters = {p.dtype for p in pipeline.parameters.values()}
    assert masters == {torch.float32}


# running statistics


class Normed(MLP):
    """An MLP behind a batch norm, whose statistics forwards follow."""

    def __init__(self, shape: hp.ModelShape) -> None:
        super().__init__(shape)
        self.statistics = nn.BatchNorm1d(shape.hidden)

    def forward(self, y: Tensor) -> Tensor:
        return super().forward(self.statistics(y.flatten(0, 1)).view_as(y))


def normed() -> Others:
    shape = Listing(**SIZES)
    return Others(shape, lambda part, module: Normed(shape) if part.kind == "mlp" else module)


def run_normed(mesh: tuple[tuple[str, int], ...], family: str, ranks: int) -> tuple[float, float, Named] | None:
    made = device_mesh(mesh) if mesh else mesh_of(ranks)
    if made is None:
        return None
    model, options = normed(), {"travel": "none"} if family == "helix" else {}
    schedule = hp.build_schedule(family, ranks=ranks, layers=3, microbatches=2, **options)
    pipeline = hp.Pipeline(model, schedule, made, dtype=torch.float64, recompute="none", timeout_s=30)
    replicas = dict(mesh).get("dp", 1)
    for step in range(2):
        loss = pipeline.step(*batch(model.shape, 2 * replicas, 8, seed=step))
    evaluated = pipeline.evaluate(*batch(model.shape, 2 * replicas, 8))
    pipeline.close()
    return loss, evaluated, {name: buffer.clone() for name, buffer in pipeline.buffers().items()}


@pytest.mark.parametrize(
    ("mesh", "family", "ranks"),
    [((), "1f1b", 1), ((), "1f1b", 3), ((), "zb_h1", 2), ((), "helix", 2), ((("pp", 2), ("dp", 2)), "1f1b", 2)],
)
def test_running_statistics_follow_every_micro_batch_once(
    four_ranks: Ranks, mesh: tuple[tuple[str, int], ...], family: str, ranks: int
) -> None:
    """Of several replicas, those of the first count on all, as in torch's DistributedDataParallel."""
    plain, replicas = Plain(normed()), dict(mesh).get("dp", 1)
    for step in range(2):
        tokens, targets = batch(plain.shape, 2 * replicas, 8, seed=step)
        loss = plain.step(tokens[:2], targets[:2])
    found: Named = {}
    for result in filter(None, four_ranks.run(run_normed, mesh, family, ranks)):
        if replicas == 1:
            assert abs(result[0] - loss) < 1e-12
        for name, buffer in result[2].items():
            assert torch.equal(found.setdefault(name, buffer), buffer), f"{name} differs between replicas"
    wanted = {
        plain.shape.parameter_name(part, place): buffer
        for part, module in plain.parts.items()
        for place, buffer in module.named_buffers()
    }
    assert found.keys() == wanted.keys()
    assert len(wanted) == 9
    for name, buffer in wanted.items():
        assert torch.allclose(found[name].double(), buffer.double(), rtol=1e-12, atol=1e-15), name


# checkpoints


def state_of(folder: str, seed: int, steps: int, sharded: bool) -> tuple[Path, dict[str, Tensor], list[str]]:
    """On a rank of pp 2 x dp 2: what a checkpoint has after some steps, or what is there after it was loaded."""
    model = normed()
    model.shape = Listing(**SIZES, frozen=("embed.*", "layers.1.*"))
    schedule = hp.build_schedule("1f1b", ranks=2, layers=3, microbatches=2)
    pipeline = hp.Pipeline(
        model, schedule, device_mesh((("pp", 2), ("dp", 2))), dtype=torch.float64, recompute="none", timeout_s=30
    )
    shards = pipeline.shards() if sharded else None
    optimizer = Optimizer(pipeline.parameters, Config().train, pipeline.as_whole, shards, pipeline.buffers)
    checkpoints = Checkpoints(Path(folder), 2, dist.group.WORLD)
    if not steps:
        for tensor in (*pipeline.parameters.values(), *pipeline.buffers().values()):
            tensor.data.zero_()
        state = optimizer.state(2)
        checkpoints.load(Path(folder) / "step-00000002", state)
        live = {f"model.{name}": p.data for name, p in pipeline.parameters.items()}
        live |= {f"model.{name}": buffer for name, buffer in pipeline.buffers().items()}
        assert all(torch.equal(tensor, state[name]) for name, tensor in live.items())
    for step in range(steps):
        pipeline.zero_gradients()
        pipeline.step(*batch(model.shape, 4, 8, seed=step))
        optimizer.step(step)
    state = optimizer.state(2)
    path = checkpoints.save(state, 2, Config()) if steps else Path(folder)
    pipeline.close()
    frozen = [name for name, p in pipeline.parameters.items() if not p.requires_grad]
    return path, {name: tensor.clone() for name, tensor in state.items()}, frozen


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_has_what_is_frozen_and_buffers(four_ranks: Ranks, tmp_path: Path, sharded: bool) -> None:
    saved = four_ranks.run(state_of, str(tmp_path / "checkpoints"), 1, 2, sharded)
    loaded = four_ranks.run(state_of, str(tmp_path / "checkpoints"), 2, 0, not sharded)
    wrote = {name: tensor for _, state, _ in saved for name, tensor in state.items()}
    got = {name: tensor for _, state, _ in loaded for name, tensor in state.items()}
    assert got.keys() == wrote.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wrote.items())
    frozen = {name for *_, names in saved for name in names}
    assert frozen == {name for name in wrote_models(wrote) if name.startswith(("embed.", "layers.1."))}
    assert all(f"optimizer.{name}.exp_avg" not in wrote for name in frozen)
    assert wrote["model.layers.1.mlp.statistics.num_batches_tracked"] == 4
    plain = Plain(normed()).parameters
    assert all(torch.equal(wrote[f"model.{name}"], plain[name]) for name in frozen), "a frozen parameter moved"
    assert not torch.equal(wrote["model.layers.0.mlp.up.weight"], plain["layers.0.mlp.up.weight"])


def wrote_models(state: Named) -> list[str]:
    """Parameters in a checkpoint."""
    names = [name.removeprefix("model.") for name in state if name.startswith("model.")]
    return [name for name in names if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
