"""Attention kernel: which of CUDA's computes attention in half precision, chosen where a pipeline is made.

    cudnn       cuDNN's
    fa3         FlashAttention 3 in the place of torch's flash attention, in the whole process; its package, and Hopper
    flash       torch's flash attention, which is FlashAttention 2
    efficient   torch's memory-efficient kernel
    auto        what torch itself takes for such heads on such a device (cuDNN or flash), then flash, then efficient

Each is tried before it is taken: a causal square and the keys before it, merged and differentiated as segments and rings are,
against the CPU's float64. Documents and windows need variable lengths, which flash attention has (`model.joint`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from helixpipe.errors import ConfigError
from helixpipe.model.attn import Attention
from helixpipe.model.kernels import HALVES, Kernel, Scores
from helixpipe.model.merging import ALL, Merged, Total, attend_tiles, differentiate_tiles
from helixpipe.model.tiles import Tile
from helixpipe.parts.shape import ModelShape

Asked = Literal["auto", "cudnn", "fa3", "flash", "efficient"]
WORDS: dict[Kernel, str] = {
    "cudnn": "cuDNN", "flash": "torch's flash attention", "efficient": "torch's memory-efficient kernel",
}  # fmt: skip
TOKENS, TOLERANCE = 64, 3e-2


class Heads(NamedTuple):
    """On this rank."""

    queries: int
    keys: int
    dim: int


class Choice(NamedTuple):
    kernel: Kernel
    words: str
    """For a log; "" on a CPU, which has one."""


def give(asked: str, modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype, shape: ModelShape) -> str:
    """Have the attention of this rank's parts run what was asked for; what that is, in words. Raises ConfigError.

    `shape`: the model's on one of its tp ranks.
    """
    if asked not in get_args(Asked):
        raise ConfigError(f"runtime.attention: '{asked}' is not known; known: {', '.join(get_args(Asked))}")
    mine = [inner for module in modules for inner in module.modules() if isinstance(inner, Attention)]
    if not mine:
        return ""
    heads = Heads(shape.heads, shape.kv_heads, shape.head_dim)
    choice = choose(asked, device, dtype, heads, max(inner.rule.softcap for inner in mine))
    for inner in mine:
        inner.rule = replace(inner.rule, kernel=choice.kernel)
    return choice.words


def choose(asked: str, device: torch.device, dtype: torch.dtype, heads: Heads, softcap: float = 0.0) -> Choice:
    """The kernel that is to run. Raises ConfigError for one that cannot."""
    why = ""
    if device.type != "cuda":
        why, words = f"is a kernel of CUDA, and this runs on {device.type}", ""
    elif softcap:
        why, words = "does not cap scores, as this model does", "torch's operations, since scores are capped"
    elif dtype not in HALVES:
        why = f"computes in half precision, and runtime.dtype is {str(dtype).removeprefix('torch.')}"
        words = WORDS["efficient"] if dtype == torch.float32 else "torch's operations"
    if why and asked != "auto":
        raise ConfigError(f"runtime.attention: '{asked}' {why}; set it to auto")
    return Choice("flash", words) if why else _tried(asked, device, dtype, heads)


def _tried(asked: str, device: torch.device, dtype: torch.dtype, heads: Heads) -> Choice:
    faults = []
    if asked == "fa3":
        faults += _activate()
    elif asked == "flash":
        _restore()
    order: list[Kernel] = [*_of_torch(device, dtype, heads), "flash", "efficient"]
    for kernel in order if asked == "auto" else _named(asked):
        if faults and asked != "auto":
            break
        fault = trial(kernel, device, dtype, heads)
        if not fault:
            in_place = "FlashAttention 3" if kernel == "flash" and _active() == "FA3" else WORDS[kernel]
            return Choice(kernel, in_place)
        faults.append(f"{kernel}: {fault}" if asked == "auto" else fault)
    if asked == "fa3":
        _restore()
    known = "set runtime.dtype to float32" if asked == "auto" else "set it to auto"
    raise ConfigError(f"runtime.attention: '{asked}' cannot be had here ({'; '.join(faults)}); {known}")


def _named(asked: str) -> list[Kernel]:
    return ["flash" if asked == "fa3" else asked]  # type: ignore[list-item]


def trial(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: Heads) -> str:
    """What is wrong with a kernel; "" where nothing is."""
    try:
        found = _run(kernel, device, dtype, heads)
    except (RuntimeError, AttributeError) as error:
        return " ".join(str(error).split(". ")[0].split())
    expected = _run(kernel, torch.device("cpu"), torch.float64, heads)
    for name, mine, right in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        off = float((mine - right).norm() / right.norm())
        if not off < TOLERANCE:
            return f"its {name} is off by {off:.0%}"
    return ""


def _run(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: Heads) -> list[Tensor]:
    """Output and gradients, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((TOKENS, heads.queries), (2 * TOKENS, heads.keys), (2 * TOKENS, heads.keys), (TOKENS, heads.queries))
    drawn = (torch.randn(1, tokens, n, heads.dim, generator=generator) for tokens, n in sizes)
    q, k, v, grad = (each.to(torch.bfloat16).to(device, dtype).transpose(1, 2) for each in drawn)
    tiles = (Tile(0, TOKENS, TOKENS, 2 * TOKENS, True), Tile(0, TOKENS, 0, TOKENS, False))
    scores, merged = Scores(kernel=kernel), Merged(q)
    for tile in tiles:
        attend_tiles(merged, q, k, v, [(ALL, tile)], scores)
    out, lse = merged.result()
    totals = Total(q), Total(k), Total(v)
    for tile in tiles:
        differentiate_tiles(*totals, grad, q, k, v, out, lse, [(ALL, tile)], scores)
    return [each.detach().cpu().double() for each in (out, *(total.result() for total in totals))]


def _of_torch(device: torch.device, dtype: torch.dtype, heads: Heads) -> list[Kernel]:
    """What torch's own scaled_dot_product_attention would run."""
    q, k, v = (
        torch.empty(1, n, TOKENS, heads.dim, dtype=dtype, device=device, requires_grad=True)
        for n in (heads.queries, heads.keys, heads.keys)
    )
    try:
        chosen = torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=heads.keys < heads.queries)
    except (RuntimeError, AttributeError):
        return []
    return ["cudnn"] if chosen == SDPBackend.CUDNN_ATTENTION.value else []


def _active() -> str | None:
    """What stands in the place of torch's flash attention in this process."""
    try:
        from torch.nn.attention import current_flash_attention_impl
    except ImportError:  # before torch 2.12
        return None
    return current_flash_attention_impl()


def _activate() -> list[str]:
    """Have FlashAttention 3 run; why it cannot."""
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        return [" ".join(str(error).split())]
    return []


def _restore() -> None:
    if _active() is not None:
        from torch.nn.attention import restore_flash_attention_impl

        restore_flash_attention_impl()
