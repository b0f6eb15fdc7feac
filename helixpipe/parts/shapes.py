"""Named shapes: the models that people ask about, as data."""

from __future__ import annotations

from dataclasses import replace

from helixpipe.errors import ConfigError, nearest
from helixpipe.parts.shape import ModelShape


def _paper(layers: int, hidden: int, heads: int) -> ModelShape:
    """The models of the HelixPipe paper (arXiv 2507.00394, section 5): GPT-like, MLP of 4h."""
    return ModelShape(
        layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, vocabulary=50257, mlp="gelu", norm="layer"
    )


SHAPES: dict[str, ModelShape] = {
    "tiny": ModelShape(layers=4, hidden=128, heads=4, ffn=512, vocabulary=256, mlp="gelu"),
    "1.3b": _paper(24, 2048, 16),
    "3b": _paper(16, 4096, 32),
    "7b": _paper(32, 4096, 32),
    "13b": _paper(40, 5120, 40),
    "gpt2": ModelShape(
        layers=12, hidden=768, heads=12, ffn=3072, vocabulary=50257, norm="layer", positions="learned",
        context=1024, mlp="gelu", qkv_bias=True, bias=True, tied=True,
    ),
    "llama3-8b": ModelShape(
        layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=128256, rope_base=500000.0,
    ),
    "qwen2.5-7b": ModelShape(
        layers=28, hidden=3584, heads=28, kv_heads=4, ffn=18944, vocabulary=152064, rope_base=1e6,
        norm_eps=1e-6, qkv_bias=True,
    ),
}  # fmt: skip


def named_shape(name: str, **changes: object) -> ModelShape:
    """The shape of that name with some fields changed; raises ConfigError that names the nearest."""
    if name not in SHAPES:
        raise ConfigError(f"model.name: '{name}' is not known{nearest(name, SHAPES)}")
    base = SHAPES[name]
    if "hidden" in changes or "heads" in changes:  # derived sizes follow, unless given
        derived = {"head_dim": 0} | ({"kv_heads": 0} if base.kv_heads == base.heads else {})
        changes = derived | changes
    return replace(base, **changes)  # type: ignore[arg-type]
