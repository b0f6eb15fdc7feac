"""On a CUDA device: what a step does there and nowhere else. Weight gradients added in float32 inside the product, each attention
kernel against plain attention, compiled parts, and that a step waits for its device once.

`pytest -m gpu`. The suite leaves these out.
"""

from __future__ import annotations

import pytest
import torch
from oracle import batch, plain_step

import helixpipe as hp
from helixpipe.errors import ConfigError
from helixpipe.model.kernels import Kernel
from helixpipe.model.wide import add_wide, adds_wide
from helixpipe.runtime import pipeline as pipelines
from helixpipe.runtime.attention_kernel import Heads, choose, trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run on one with `make test-gpu`"),
]

SHAPE = hp.ModelShape(layers=3, hidden=128, heads=4, kv_heads=2, ffn=256, vocabulary=64, norm_offset=True)
CUDA = torch.device("cuda:0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_added_in_float32(dtype: torch.dtype) -> None:
    assert adds_wide(CUDA, dtype)
    generator = torch.Generator().manual_seed(0)
    total = torch.randn(48, 80, generator=generator)
    x, grad = (torch.randn(3, 500, size, generator=generator).to(dtype) for size in (80, 48))
    exact = total.double() + grad.flatten(0, 1).mT.double() @ x.flatten(0, 1).double()
    found = total.to(CUDA)
    add_wide(found, x.to(CUDA), grad.to(CUDA))
    assert (found.cpu() - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("heads", [Heads(4, 4, 64), Heads(8, 2, 128)], ids=str)
def test_kernels(kernel: Kernel, heads: Heads) -> None:
    assert trial(kernel, CUDA, torch.bfloat16, heads) == ""


@pytest.mark.parametrize("asked", ["auto", "cudnn", "fa3", "flash", "efficient"])
@pytest.mark.parametrize("family", ["1f1b", "seq1f1b"])
def test_a_step_under_each_kernel(asked: str, family: str) -> None:
    data = batch(SHAPE, 4, 96)
    loss, gradients = plain_step(SHAPE, *data)
    try:
        choose(asked, CUDA, torch.bfloat16, Heads(4, 2, 32))
    except ConfigError as error:
        assert asked in ("cudnn", "fa3")  # what need not be on every device
        pytest.skip(str(error))
    options = {"segments": 3} if family == "seq1f1b" else {}
    schedule = hp.build_schedule(family, ranks=1, layers=3, microbatches=2, **options)
    pipeline = hp.Pipeline(hp.Decoder(SHAPE), schedule, device="cuda:0", dtype=torch.bfloat16, attention=asked)
    assert pipeline._weights.adds_wide
    assert abs(pipeline.step(*data) - loss) < 3e-2
    for name, parameter in pipeline.parameters.items():
        assert parameter.grad is not None
        assert (parameter.grad.cpu().double() - gradients[name]).norm() < 6e-2 * gradients[name].norm(), name
    pipeline.close()
    choose("flash", CUDA, torch.bfloat16, Heads(4, 2, 32))  # FlashAttention 3 goes again


def test_compiled_parts() -> None:
    data = batch(SHAPE, 4, 96)
    loss, gradients = plain_step(SHAPE, *data)
    schedule = hp.build_schedule("1f1b", ranks=1, layers=3, microbatches=2)
    pipeline = hp.Pipeline(hp.Decoder(SHAPE), schedule, device="cuda:0", compiled=True)
    for _ in range(2):
        pipeline.zero_gradients()
        assert abs(pipeline.step(*data) - loss) < 2e-3
    for name, parameter in pipeline.parameters.items():
        assert parameter.grad is not None
        assert (parameter.grad.cpu().double() - gradients[name]).norm() < 5e-3 * gradients[name].norm(), name
    pipeline.close()


def test_a_step_waits_for_its_device_at_its_end_alone() -> None:
    """Copies of the batch are queued like kernels, and no number is read before the last."""
    schedule = hp.build_schedule("1f1b", ranks=1, layers=3, microbatches=2)
    pipeline = hp.Pipeline(hp.Decoder(SHAPE), schedule, device="cuda:0", dtype=torch.bfloat16)
    data = batch(SHAPE, 4, 96)
    pipeline.step(*data)
    execute, strict = pipelines.execute, []

    def watched(*given: object) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            execute(*given)  # type: ignore[arg-type]
            strict.append(True)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pipelines.execute = watched  # type: ignore[assignment]
    try:
        pipeline.step(*data)
    finally:
        pipelines.execute = execute
    assert strict == [True]
    pipeline.close()
