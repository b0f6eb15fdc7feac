"""CUDA's attention kernels: which is chosen, what is tried of it before, and what is refused. Here they are emulated on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

import helixpipe as hp
from helixpipe.model import kernels, merging
from helixpipe.model.attn import Attention
from helixpipe.model.kernels import Kernel, attention_backward, attention_forward
from helixpipe.runtime import attention_kernel
from helixpipe.runtime.attention_kernel import Choice, Heads, choose, give, trial

CPU, CUDA, HALF = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
HEADS = Heads(4, 2, 16)
SHAPE = hp.ModelShape(layers=2, hidden=64, heads=4, kv_heads=2, ffn=32, vocabulary=17)


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> dict[Kernel, str]:
    """What is wrong with kernels of a CUDA device that is not there; one that is not named works. torch itself takes flash."""
    faults: dict[Kernel, str] = {}
    monkeypatch.setattr(attention_kernel, "trial", lambda kernel, *_: faults.get(kernel, ""))
    monkeypatch.setattr(attention_kernel, "_of_torch", lambda *_: [])
    return faults


def test_a_choice_is_what_works_first(works: dict[Kernel, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto", CUDA, HALF, HEADS) == Choice("flash", "torch's flash attention")
    monkeypatch.setattr(attention_kernel, "_of_torch", lambda *_: ["cudnn"])
    assert choose("auto", CUDA, HALF, HEADS) == Choice("cudnn", "cuDNN")
    works["cudnn"] = "its dq is off by 12%"
    assert choose("auto", CUDA, HALF, HEADS) == Choice("flash", "torch's flash attention")
    works["flash"] = "no kernel"
    assert choose("auto", CUDA, HALF, HEADS) == Choice("efficient", "torch's memory-efficient kernel")
    works["efficient"] = "no kernel either"
    assert refused("auto") == (
        "runtime.attention: 'auto' cannot be had here (cudnn: its dq is off by 12%; flash: no kernel; efficient: no kernel either); "
        "set runtime.dtype to float32"
    )


@pytest.mark.parametrize("asked", ["cudnn", "flash", "efficient"])
def test_what_is_asked_for_is_tried_alone(works: dict[Kernel, str], asked: Kernel) -> None:
    assert choose(asked, CUDA, HALF, HEADS).kernel == asked
    works[asked] = "no execution plan"
    assert refused(asked) == f"runtime.attention: '{asked}' cannot be had here (no execution plan); set it to auto"


def test_flash_attention_3_is_activated_and_let_go_again(
    works: dict[Kernel, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    active: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", active.clear)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active[0] if active else None)
    assert choose("fa3", CUDA, HALF, HEADS) == Choice("flash", "FlashAttention 3")
    assert active == ["FA3"]
    assert choose("auto", CUDA, HALF, HEADS) == Choice("flash", "FlashAttention 3")  # whoever activated it wants it
    assert choose("flash", CUDA, HALF, HEADS) == Choice("flash", "torch's flash attention")
    assert not active
    works["flash"] = "FA3 requires compute capability 9.0"
    assert refused("fa3") == (
        "runtime.attention: 'fa3' cannot be had here (FA3 requires compute capability 9.0); set it to auto"
    )
    assert not active


def test_flash_attention_3_that_is_not_installed_is_refused(works: dict[Kernel, str]) -> None:
    assert refused("fa3") == (
        "runtime.attention: 'fa3' cannot be had here (No module named 'flash_attn_interface'); set it to auto"
    )


def refused(asked: str, device: torch.device = CUDA, dtype: torch.dtype = HALF, softcap: float = 0.0) -> str:
    with pytest.raises(hp.ConfigError) as caught:
        choose(asked, device, dtype, HEADS, softcap)
    return str(caught.value)


def test_what_has_no_choice() -> None:
    assert choose("auto", CPU, HALF, HEADS) == Choice("flash", "")
    assert choose("auto", CUDA, torch.float32, HEADS).words == "torch's memory-efficient kernel"
    assert choose("auto", CUDA, torch.float64, HEADS).words == "torch's operations"
    assert choose("auto", CUDA, HALF, HEADS, 30.0).words == "torch's operations, since scores are capped"
    assert refused("cudnn", CPU) == (
        "runtime.attention: 'cudnn' is a kernel of CUDA, and this runs on cpu; set it to auto"
    )
    assert refused("fa3", CUDA, torch.float32) == (
        "runtime.attention: 'fa3' computes in half precision, and runtime.dtype is float32; set it to auto"
    )
    assert refused("flash", CUDA, HALF, 30.0) == (
        "runtime.attention: 'flash' does not cap scores, as this model does; set it to auto"
    )


def test_a_pipeline_has_its_attention_run_what_was_chosen(
    works: dict[Kernel, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [nn.Sequential(Attention(True), nn.Linear(2, 2)), Attention(True, window=3)]
    assert give("cudnn", modules, CUDA, HALF, SHAPE) == "cuDNN"
    assert [m.rule.scores.kernel for part in modules for m in part.modules() if isinstance(m, Attention)] == [
        "cudnn",
        "cudnn",
    ]
    assert modules[1].rule.window == 3
    assert give("auto", modules, CPU, HALF, SHAPE) == ""
    assert modules[1].rule.scores.kernel == "flash"
    assert give("cudnn", [nn.Linear(2, 2)], CPU, HALF, SHAPE) == ""  # of a rank that has none
    schedule = hp.build_schedule("1f1b", ranks=1, layers=2, microbatches=1)
    for asked, said in (
        ("fast", "'fast' is not known; known: auto, cudnn, fa3, flash, efficient"),
        ("flash", "'flash' is a kernel of CUDA, and this runs on cpu; set it to auto"),
    ):
        with pytest.raises(hp.ConfigError) as caught:
            hp.Pipeline(hp.Decoder(SHAPE), schedule, attention=asked)
        assert str(caught.value) == f"runtime.attention: {said}"


def test_a_trial_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the CPU's own kernel in bfloat16, which is right, and of ones that are not."""
    assert trial("flash", CPU, HALF, HEADS) == ""
    forward, backward = merging.attention_forward, merging.attention_backward

    def bottom_right(q: Tensor, k: Tensor, v: Tensor, causal: bool, *more: Any) -> tuple[Tensor, Tensor]:
        return forward(q, k, v, False, *more)  # a mask that is not there

    def of_its_own(*given: Any) -> tuple[Tensor, ...]:
        grad, q, k, v, _, _lse, causal, *more = given
        return backward(grad, q, k, v, *forward(q, k, v, causal, *more), causal, *more)  # not of what was merged

    def only_half(function: Any, other: Any) -> Any:
        return lambda *given: (other if given[0].dtype == HALF else function)(*given)

    monkeypatch.setattr(merging, "attention_forward", only_half(forward, bottom_right))
    assert trial("flash", CPU, HALF, HEADS).startswith("its output is off by ")
    monkeypatch.setattr(merging, "attention_forward", forward)
    monkeypatch.setattr(merging, "attention_backward", only_half(backward, of_its_own))
    assert trial("flash", CPU, HALF, HEADS).startswith("its dq is off by ")

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("cuDNN Frontend error:\n No valid execution plans. Called from elsewhere")

    monkeypatch.setattr(merging, "attention_backward", only_half(backward, refuse))
    assert trial("flash", CPU, HALF, HEADS) == "cuDNN Frontend error: No valid execution plans"


@pytest.mark.parametrize(
    ("answer", "expected"), [(SDPBackend.CUDNN_ATTENTION.value, ["cudnn"]), (SDPBackend.FLASH_ATTENTION.value, [])]
)
def test_torch_is_asked_what_it_would_take(
    monkeypatch: pytest.MonkeyPatch, answer: int, expected: list[Kernel]
) -> None:
    asked: list[Any] = []

    def answering(q: Tensor, k: Tensor, *more: Any, enable_gqa: bool) -> int:
        asked.append((q.shape[1], k.shape[1], q.requires_grad, enable_gqa))
        return answer

    monkeypatch.setattr(torch, "_fused_sdp_choice", answering)
    assert attention_kernel._of_torch(CPU, HALF, HEADS) == expected
    assert asked == [(4, 2, True, True)]


class OnCuda(torch.Tensor):
    """A tensor that says so and is not."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


def cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: None, lse: bool, p: float, causal: bool, *, scale: float | None
) -> Any:
    """As `aten._scaled_dot_product_cudnn_attention`: a log-sum-exp of [b, heads, s, 1]."""
    assert lse
    out, found = attention_forward(*(t.as_subclass(Tensor) for t in (q, k, v)), causal, scale=scale or 0.0)
    more = None, None, q.shape[2], k.shape[2], None, None, None
    return out.as_subclass(OnCuda), found.unsqueeze(-1).as_subclass(OnCuda), *more


def cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor, bias: None,
    q_ends: None, k_ends: None, most_q: int, most_k: int, p: float, causal: bool, *, scale: float | None,
) -> Any:  # fmt: skip
    assert lse.shape == (*q.shape[:3], 1)
    assert lse.is_contiguous()
    assert (most_q, most_k) == (q.shape[2], k.shape[2])
    given = [t.as_subclass(Tensor) for t in (grad, q, k, v, out, lse.squeeze(-1))]
    return [t.as_subclass(OnCuda) for t in attention_backward(*given, causal, scale=scale or 0.0)]


def test_cudnn_is_given_what_it_takes_and_gives_what_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operators exist with these arguments, and results go on as those of any kernel."""
    for fake in (cudnn, cudnn_backward):
        name = "_scaled_dot_product_cudnn_attention" + ("_backward" if fake is cudnn_backward else "")
        schema = getattr(kernels.aten, name).default._schema
        theirs = [argument.name for argument in schema.arguments if argument.name != "return_debug_mask"]
        assert len(theirs) == fake.__code__.co_argcount + fake.__code__.co_kwonlyargcount
    real = kernels.aten
    fake_aten = SimpleNamespace(
        _scaled_dot_product_flash_attention_for_cpu=real._scaled_dot_product_flash_attention_for_cpu,
        _scaled_dot_product_flash_attention_for_cpu_backward=real._scaled_dot_product_flash_attention_for_cpu_backward,
        _scaled_dot_product_cudnn_attention=cudnn,
        _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
    )
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 4, 20, 8, generator=generator).to(HALF) for _ in range(2))
    k, v = (torch.randn(2, 2, 20, 8, generator=generator).to(HALF) for _ in range(2))
    expected = [*attention_forward(q, k, v, True, scale=0.3)]
    expected += attention_backward(grad, q, k, v, *expected, True, scale=0.3)
    monkeypatch.setattr(kernels, "aten", fake_aten)
    q, k, v, grad = (t.as_subclass(OnCuda) for t in (q, k, v, grad))
    found = [*attention_forward(q, k, v, True, 0.0, 0.3, "cudnn")]
    found += attention_backward(grad, q, k, v, *found, True, 0.0, 0.3, "cudnn")
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.as_subclass(Tensor), theirs)
