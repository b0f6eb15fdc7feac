"""What somebody's own part gives: of another number, shape or precision it is told at the part, by name; inputs may go unread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import batch
from ranks import Ranks, mesh_of
from torch import Tensor, nn

import helixpipe as hp

SHAPE = hp.ModelShape(layers=2, hidden=16, heads=4, ffn=24, vocabulary=19)


class Own(nn.Module):
    """Another's module around ours."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.inner, *inputs)


class OwnModel:
    """A decoder with one kind of part called in another way."""

    def __init__(self, kind: str, call: Callable[..., Any]) -> None:
        self.shape, self._kind, self._call = _Shape(**vars(SHAPE), own=kind), kind, call
        self._decoder = hp.Decoder(SHAPE)

    def part(self, part: hp.Part) -> nn.Module:
        module = self._decoder.part(part)
        return Own(module, self._call) if part.kind == self._kind else module


class _Shape(hp.ModelShape):
    def __init__(self, *, own: str, **fields: Any) -> None:
        super().__init__(**fields)
        object.__setattr__(self, "own", own)

    def parameters(self, part: hp.Part) -> dict[str, tuple[int, ...]]:
        found = super().parameters(part)
        return {f"inner.{name}": size for name, size in found.items()} if part.kind == self.own else found


def without_x(proj: nn.Module, o: Tensor, x: Tensor) -> Tensor:
    """It reads no residual."""
    return proj.o(o)  # type: ignore[no-any-return]


def unread(ranks: int, travel: str, recompute: str) -> tuple[float, dict[str, Tensor]] | None:
    mesh = mesh_of(ranks)
    if mesh is None:
        return None
    schedule = hp.build_schedule("helix", ranks=ranks, layers=2, microbatches=4, travel=travel)
    model = OwnModel("proj", without_x)
    pipeline = hp.Pipeline(model, schedule, mesh, dtype=torch.float64, recompute=recompute, timeout_s=30)
    loss = pipeline.step(*batch(SHAPE, 4, 12))
    pipeline.close()
    return loss, {name: p.grad for name, p in pipeline.parameters.items()}


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("travel", ["none", "attention"])
def test_an_input_that_a_part_ignores_has_a_gradient_of_zero(four_ranks: Ranks, travel: str, recompute: str) -> None:
    """Also where it came by a message, and its gradient is one: x of each layer."""
    one, two = (four_ranks.run(unread, ranks, travel, recompute)[:ranks] for ranks in (1, 2))
    assert all(abs(result[0] - one[0][0]) < 1e-12 for result in two)
    found = {name: gradient for result in two for name, gradient in result[1].items()}
    assert found.keys() == one[0][1].keys()
    for name, gradient in one[0][1].items():
        assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


@pytest.mark.parametrize(("kind", "call", "message"), [
    ("norm", lambda norm, x: norm(x).float(), "norm.0: Own gave n as float32 [1, 12, 16]; give it as bfloat16 [1, 12, 16]"),
    ("proj", lambda proj, o, x: proj(o, x)[:, :-1], "proj.0: Own gave y as bfloat16 [1, 11, 16]; give it as bfloat16 [1, 12, 16]"),
    ("qkv", lambda qkv, n, start: qkv(n, start)[:2], "qkv.0: Own gave 2 tensors; give q, k, v, 3 in all"),
    ("head", lambda head, x, targets: head(x, targets).expand(3), "head.2: Own gave loss as float32 [3]; give it as bfloat16 []"),
])  # fmt: skip
def test_a_part_that_gives_something_else_is_told_by_name(kind: str, call: Callable[..., Any], message: str) -> None:
    """Before, a message's buffer met it: bytes read as another type, or a rank that waited for more."""
    schedule = hp.build_schedule("1f1b", ranks=1, layers=2, microbatches=2)
    pipeline = hp.Pipeline(OwnModel(kind, call), schedule, dtype=torch.bfloat16)
    with pytest.raises(hp.ConfigError) as caught:
        pipeline.step(*batch(SHAPE, 2, 12))
    assert str(caught.value) == message
    pipeline.close()
