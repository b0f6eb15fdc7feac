"""What parts compute where architectures differ: activations, norms and tables by themselves; and that nothing costs nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import helixpipe as hp
from helixpipe.model.activation import ACTIVATIONS
from helixpipe.model.norm import RMSNorm
from helixpipe.parts.part import chain
from helixpipe.parts.shape import GATED, UNGATED
from helixpipe.parts.work import Batch, Keeping, Work
from helixpipe.predict.cost import Analytic
from helixpipe.predict.hardware import named_accelerator

SHAPE = hp.ModelShape(layers=3, hidden=12, heads=4, head_dim=6, kv_heads=2, ffn=20, vocabulary=19)
PLAIN = {
    "swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*GATED, *UNGATED])
def test_an_activation_and_its_backward_are_autograd_s(name: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(1 + (name in GATED))]
    gate, *up = inputs
    expected = PLAIN[name](gate) * (up[0] if up else 1)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, grad)
    activation, given = ACTIVATIONS[name], [each.detach() for each in inputs]
    torch.testing.assert_close(activation.forward(*given), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(activation(*inputs), expected, rtol=1e-13, atol=1e-13)
    found = activation.backward(grad.clone(), *given)
    for mine, theirs, each, before in zip(found, gradients, given, inputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)
        assert torch.equal(each, before)  # what is kept stays


def test_one_is_added_to_a_weight_in_float32() -> None:
    """A narrow weight near 0 is all that a bfloat16 of 1 + weight would lose."""
    torch.manual_seed(0)
    norm = RMSNorm(64, 1e-6, offset=True).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(1e-3 * torch.randn(64))
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = norm.weight.detach().double()

    def plain(x: Tensor, factor: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * factor

    wide = x.detach().double().requires_grad_()
    expected = plain(wide, 1 + weight)
    made = norm(x)
    assert made.dtype == torch.bfloat16
    half_a_step = 2.0**-8 * expected.abs() * (1 + 1e-4)  # bfloat16 has 8 bits
    assert ((made.double() - expected).abs() <= half_a_step).all()
    lost = plain(wide, (1 + norm.weight).double())
    assert not ((lost - expected).abs() <= 2.0**-12 * expected.abs()).all()
    grad = torch.randn_like(x)
    made.backward(grad)
    (gradient,) = torch.autograd.grad(expected, wide, grad.double())
    assert x.grad is not None
    assert (x.grad.double() - gradient).norm() < 2.0**-8 * gradient.norm()


def test_norms_multiply_by_one_at_first() -> None:
    for offset in (False, True):
        x = torch.randn(2, 5, SHAPE.hidden)
        norm = hp.Decoder(replace(SHAPE, norm_offset=offset)).part(hp.Part("norm", 0))
        torch.testing.assert_close(norm(x), F.rms_norm(x, (SHAPE.hidden,), eps=SHAPE.norm_eps))


def test_a_scale_is_rounded_to_the_table_s_precision() -> None:
    scale = 12**0.5
    embed = hp.Decoder(replace(SHAPE, embed_scale=scale)).part(hp.Part("embed", 0)).bfloat16()
    rows = embed.tokens.weight.detach()
    made = embed(torch.arange(19).unsqueeze(0), 0)[0]
    assert torch.equal(made, rows * torch.tensor(scale).bfloat16())
    assert not torch.equal(made, (rows.double() * scale).bfloat16())


WITHOUT = [(replace(SHAPE, norms="after"), (0, 1, 2)), (replace(SHAPE, embed_norm=True), (0,))]


@pytest.mark.parametrize(("shape", "layers"), WITHOUT, ids=["after", "embed_norm"])
def test_where_no_norm_is_n_is_x_and_costs_nothing(shape: hp.ModelShape, layers: tuple[int, ...]) -> None:
    batch = Batch(2, (8, 8))
    work = Work(shape, batch, 1, Keeping("none"))
    costs = Analytic(shape, named_accelerator("h100"))
    x = torch.randn(2, 8, shape.hidden)
    for layer in range(3):
        part = hp.Part("norm", layer)
        about = shape.about(part)
        prices = [price(part, batch, 1) for price in (costs.forward_s, costs.input_s, costs.weight_s)]
        needed = [work.forward_workspace(part, graph=True), work.backward_workspace(part, unread=False)]
        module = hp.Decoder(shape).part(part)
        if layer in layers:
            assert module(x) is x
            assert not [*module.parameters(), *shape.parameters(part), *filter(None, prices), *filter(None, needed)]
            assert (about.moved(part, work), work.saved(part), work.put_off(part)) == (0, {}, {})
        else:
            assert list(shape.parameters(part)) == ["weight"]
            assert min(prices[:2]) > 0
    assert (shape.alike(hp.Part("norm", 0)) == shape.alike(hp.Part("norm", 1))) == (len(layers) == 3)


@pytest.mark.parametrize("shape", [SHAPE, *(shape for shape, _ in WITHOUT), replace(SHAPE, norms="both")])
def test_a_block_has_the_parameters_of_its_parts(shape: hp.ModelShape) -> None:
    """Layer 0's may be a norm short of the others'."""
    for layer in range(3):
        block = hp.Part("block", layer)
        names = [
            shape.parameter_name(part, name)
            for part in chain(3)[1:-1]
            if part.layer == layer
            for name in shape.parameters(part)
        ]
        assert [shape.parameter_name(block, name) for name in shape.parameters(block)] == names
        module = hp.Decoder(shape).part(block)
        assert {name: tuple(p.shape) for name, p in module.named_parameters()} == shape.parameters(block)


LIKE_BERT = replace(SHAPE, norm="layer", mlp="geglu", head_transform=True, bias=True, embed_norm=True)


@pytest.mark.parametrize("shape", [LIKE_BERT, replace(SHAPE, norms="both", o_bias=True, mlp="gelu_tanh")])
def test_flops_are_those_of_the_matrices_that_run(shape: hp.ModelShape) -> None:
    batch = Batch(2, (8,))
    x, tokens = torch.randn(2, 8, shape.hidden), torch.zeros(2, 8, dtype=torch.int64)
    o = torch.randn(2, 8, shape.q_size)
    given: dict[str, tuple[object, ...]] = {"embed": (tokens, 0), "proj": (o, x), "mlp": (x,), "head": (x, tokens)}
    for part in chain(1):
        if part.kind in given:
            module = hp.Decoder(shape).part(part)
            with FlopCounterMode(display=False) as counter:
                module(*given[part.kind])
            assert shape.forward_flops(part, batch, 0) == counter.get_total_flops(), part
