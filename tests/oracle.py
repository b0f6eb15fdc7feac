"""Plain autograd on one process: what every pipeline must equal.

Written with torch alone. Of the library it reads a ModelShape and the values of parameters, by name; it runs no part
and no autograd function of the library, so what is wrong there is not wrong here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from values import initial_values

import helixpipe as hp

Weights = dict[str, Tensor]


def plain_step(
    shape: hp.ModelShape, tokens: Tensor, targets: Tensor, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of a Decoder's first step and the gradient of every parameter, by full name."""
    return plain_gradients(shape, initial_values(shape, seed), tokens, targets, dtype)


def plain_gradients(
    shape: hp.ModelShape, values: Weights, tokens: Tensor, targets: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[float, dict[str, Tensor]]:
    """The same with parameters of these values. A parameter that the model does not read is an error."""
    w = {name: value.to(dtype, copy=True).requires_grad_() for name, value in values.items()}
    logits = plain_logits(shape, w, tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    gradients = torch.autograd.grad(loss, list(w.values()))
    return float(loss.detach()), dict(zip(w, gradients, strict=True))


def plain_logits(shape: hp.ModelShape, w: Weights, tokens: Tensor) -> Tensor:
    """tokens [b, s] -> [b, s, vocabulary]"""
    x = F.embedding(tokens, w["embed.tokens.weight"]) * shape.embed_scale
    if shape.positions == "learned":
        x = x + w["embed.positions.weight"][: tokens.shape[1]]
    if shape.embed_norm:
        x = _norm(shape, w, "embed.norm", x)
    before, after = shape.norms in ("before", "both"), shape.norms in ("after", "both")
    for layer in range(shape.layers):
        at = f"layers.{layer}"
        n = _norm(shape, w, f"{at}.norm", x) if before and not (shape.embed_norm and layer == 0) else x
        windowed = not shape.window_pattern or shape.window_pattern[layer % len(shape.window_pattern)]
        window = shape.window if windowed else 0
        base = (window and shape.window_rope_base) or shape.rope_base
        o, _ = plain_attention(
            *_qkv(shape, w, f"{at}.qkv", n, base), shape.causal, window, shape.softcap, shape.attention_scale
        )
        made = _linear(w, f"{at}.proj.o", o.transpose(1, 2).flatten(2), shape.bias or shape.o_bias)
        y = x + (_norm(shape, w, f"{at}.proj.norm", made) if after else made)
        made = _mlp(shape, w, f"{at}.mlp", _norm(shape, w, f"{at}.mlp.norm", y) if before else y)
        x = y + (_norm(shape, w, f"{at}.mlp.after", made) if after else made)
    return _head(shape, w, _norm(shape, w, "head.norm", x))


def _head(shape: hp.ModelShape, w: Weights, n: Tensor) -> Tensor:
    if shape.head_transform:
        n = _norm(shape, w, "head.dense_norm", F.gelu(_linear(w, "head.dense", n, shape.bias)))
    logits = _linear(w, "embed.tokens" if shape.tied else "head.output", n, False)
    if shape.head_transform:
        logits = logits + w["head.bias"]
    return shape.head_softcap * torch.tanh(logits / shape.head_softcap) if shape.head_softcap else logits


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int = 0, softcap: float = 0.0, scale: float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ/√d)V [b, heads, s, d] and its log-sum-exp [b, heads, s]; k and v may have fewer heads.

    Masked are keys after their query where `causal`, and with a window all that are `window` or more tokens away.
    """
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    after = torch.arange(k.shape[2]) - torch.arange(q.shape[2]).unsqueeze(1)
    hidden = torch.zeros_like(after, dtype=torch.bool)
    if causal:
        hidden |= after > 0
    if window:
        hidden |= after.abs() >= window
    scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _linear(w: Weights, name: str, x: Tensor, bias: bool) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"] if bias else None)


def _norm(shape: hp.ModelShape, w: Weights, name: str, x: Tensor) -> Tensor:
    weight, size = w[f"{name}.weight"], x.shape[-1:]
    if shape.norm == "rms":
        return F.rms_norm(x, size, 1 + weight if shape.norm_offset else weight, shape.norm_eps)
    return F.layer_norm(x, size, weight, w[f"{name}.bias"] if shape.norm_bias else None, shape.norm_eps)


def _qkv(shape: hp.ModelShape, w: Weights, name: str, n: Tensor, base: float) -> tuple[Tensor, Tensor, Tensor]:
    """n [b, s, h] -> three of [b, heads, s, d]"""
    q, k, v = (_linear(w, f"{name}.{each}", n, shape.qkv_bias) for each in "qkv")
    if shape.qk_norm and shape.qk_norm_over == "width":
        q, k = _norm(shape, w, f"{name}.q_norm", q), _norm(shape, w, f"{name}.k_norm", k)
    q, k, v = (t.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for t in (q, k, v))
    if shape.qk_norm and shape.qk_norm_over == "head":
        q, k = _norm(shape, w, f"{name}.q_norm", q), _norm(shape, w, f"{name}.k_norm", k)
    if shape.positions == "rope":
        q, k = _rotated(q, base), _rotated(k, base)
    return q, k, v


def _rotated(t: Tensor, base: float) -> Tensor:
    """Rotary positions: numbers i and d/2 + i of a head are a complex one, turned by position * base^(-2i/d)."""
    length, d = t.shape[-2:]
    frequencies = torch.tensor([base ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * frequencies
    turned = torch.complex(*t.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1).to(t.dtype)


def _mlp(shape: hp.ModelShape, w: Weights, name: str, n: Tensor) -> Tensor:
    wide = _linear(w, f"{name}.up", n, shape.bias)
    activation = {
        "swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "geglu_tanh": _tanh_gelu, "gelu_tanh": _tanh_gelu,
    }[shape.mlp]  # fmt: skip
    if shape.mlp in ("swiglu", "geglu", "geglu_tanh"):
        wide = activation(_linear(w, f"{name}.gate", n, shape.bias)) * wide
    else:
        wide = activation(wide)
    return _linear(w, f"{name}.down", wide, shape.bias)


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def batch(shape: hp.ModelShape, sequences: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random tokens and targets, a few of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(shape.vocabulary, (sequences, length), generator=generator)
    targets = torch.randint(shape.vocabulary, (sequences, length), generator=generator)
    targets[:, length // 3] = -100
    return tokens, targets
