"""torch.compile for what parts compute elementwise: the same gradients, one kernel for all layers, and refusals in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import batch, plain_step

import helixpipe as hp
from helixpipe.model.activation import ACTIVATIONS
from helixpipe.model.rope import turned
from helixpipe.runtime import compiled
from helixpipe.runtime.compiled import Compiler, turned_at_once

ROOM = {"layers": 3, "hidden": 16, "heads": 2, "ffn": 24, "vocabulary": 19}
SHAPES = {
    "swiglu": hp.ModelShape(**ROOM, mlp="swiglu", qk_norm=True, norm_offset=True),
    "geglu": hp.ModelShape(**ROOM, mlp="geglu_tanh"),
    "gelu": hp.ModelShape(**ROOM, mlp="gelu", norm="layer"),
}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is compiled, traced by torch and run as it stands."""
    made: list[str] = []
    compile_ = torch.compile

    def noted(function: Any, **options: Any) -> Any:
        made.append(function.__qualname__)
        return compile_(function, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", noted)
    return made


def gradients(shape: hp.ModelShape, recompute: str, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    schedule = hp.build_schedule("1f1b", ranks=1, layers=3, microbatches=2)
    pipeline = hp.Pipeline(hp.Decoder(shape), schedule, dtype=torch.float64, recompute=recompute, **options)
    loss = pipeline.step(*batch(shape, 4, 10))
    pipeline.close()
    return loss, {name: p.grad for name, p in pipeline.parameters.items() if p.grad is not None}


@pytest.mark.parametrize(("name", "recompute"), [("swiglu", "selective"), ("geglu", "none"), ("gelu", "full")])
def test_gradients_are_those_of_plain_autograd(traced: list[str], name: str, recompute: str) -> None:
    shape = SHAPES[name]
    loss, found = gradients(shape, recompute, compiled=True)
    plain_loss, plain = plain_step(shape, *batch(shape, 4, 10))
    assert abs(loss - plain_loss) < 1e-12
    for each, gradient in plain.items():
        assert (found[each] - gradient).norm() <= 1e-9 * gradient.norm(), each
    activation = type(ACTIVATIONS[shape.mlp]).__name__
    norms = ["rms", "rms_backward"] if shape.norm == "rms" else []
    expected = {f"{activation}.forward", f"{activation}.backward", "turned_at_once", *norms}
    assert sorted(traced) == sorted(expected)  # each once, however many layers there are


def test_a_model_that_was_compiled_runs_plain_in_the_next_pipeline(traced: list[str]) -> None:
    shape = SHAPES["swiglu"]
    schedule = hp.build_schedule("1f1b", ranks=1, layers=3, microbatches=2)
    model = hp.Decoder(shape)
    for wanted in (True, False):
        pipeline = hp.Pipeline(model, schedule, compiled=wanted)
        modules = pipeline._weights.modules
        qkv, mlp = (next(m for part, m in modules.items() if part.kind == kind) for kind in ("qkv", "mlp"))
        assert (qkv.rope.turned is turned) != wanted
        assert (mlp.activation is ACTIVATIONS["swiglu"]) != wanted
        assert (mlp.norm.maths.forward is compiled.rms) != wanted
        pipeline.close()


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("size", [8, 4])
def test_what_is_compiled_of_rotary_positions_is_what_is_not(direction: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator, dtype=torch.float64)
    cos, sin = (torch.randn(5, 1, size // 2, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(turned_at_once(x, cos, sin, direction), turned(x, cos, sin, direction), rtol=1e-15)


@pytest.mark.parametrize(
    ("device", "missing", "said"),
    [
        ("cuda", "triton", "No module named 'triton'"),
        ("cpu", "compiler", "no g++ here"),
    ],
)
def test_where_nothing_can_be_compiled_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, device: str, missing: str, said: str
) -> None:
    from torch._inductor import cpp_builder

    def refuse(*_: object) -> None:
        raise ModuleNotFoundError(said) if missing == "triton" else RuntimeError(f"  {said}\n")

    if missing == "triton":
        monkeypatch.setattr(compiled, "import_module", refuse)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", refuse)
    with pytest.raises(hp.ConfigError) as caught:
        Compiler(torch.device(device), True)
    assert str(caught.value) == (
        f"runtime.compile: torch.compile needs a C++ compiler, and on CUDA Triton ({said}); install it, or set "
        "runtime.compile to false"
    )
    Compiler(torch.device(device), False)
