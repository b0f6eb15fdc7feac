"""Named shapes: the models that people ask about, as data."""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import get_close_matches

from helixpipe.errors import ConfigError, nearest
from helixpipe.parts.rotary import Rotary
from helixpipe.parts.shape import ModelShape


def _paper(layers: int, hidden: int, heads: int) -> ModelShape:
    """The models of the HelixPipe paper (arXiv 2507.00394, section 5): GPT-like, MLP of 4h."""
    return ModelShape(
        layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, vocabulary=50257, mlp="gelu", norm="layer"
    )


def _llama3(layers: int, hidden: int, heads: int, ffn: int, stretched: bool = True) -> ModelShape:
    """Llama 3; `stretched`: 3.1, whose rotary positions are made for 8192 tokens and reach 131072."""
    scaled = Rotary("llama3", factor=8.0, original=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    return ModelShape(
        layers=layers, hidden=hidden, heads=heads, kv_heads=8, ffn=ffn, vocabulary=128256, rope_base=500000.0,
        rope=scaled if stretched else Rotary(), context=131072 if stretched else 0,
    )  # fmt: skip


def _qwen(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int) -> ModelShape:
    """Qwen2.5."""
    return ModelShape(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocabulary=152064, rope_base=1e6,
        norm_eps=1e-6, qkv_bias=True,
    )  # fmt: skip


def _qwen3(layers: int, hidden: int, heads: int, ffn: int) -> ModelShape:
    return ModelShape(
        layers=layers, hidden=hidden, heads=heads, kv_heads=8, head_dim=128, ffn=ffn, vocabulary=151936, rope_base=1e6,
        norm_eps=1e-6, qk_norm=True, context=40960,
    )  # fmt: skip


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
    "smollm2-135m": ModelShape(
        layers=30, hidden=576, heads=9, kv_heads=3, ffn=1536, vocabulary=49152, rope_base=100000.0, context=8192,
        tied=True,
    ),
    "llama3-8b": _llama3(32, 4096, 32, 14336, stretched=False),
    "llama3.1-8b": _llama3(32, 4096, 32, 14336),
    "llama3.1-70b": _llama3(80, 8192, 64, 28672),
    "llama3.1-405b": _llama3(126, 16384, 128, 53248),
    "mistral-7b": ModelShape(
        layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=32768, rope_base=1e6, context=32768,
    ),
    "qwen2.5-7b": _qwen(28, 3584, 28, 4, 18944),
    "qwen2.5-32b": _qwen(64, 5120, 40, 8, 27648),
    "qwen2.5-72b": _qwen(80, 8192, 64, 8, 29568),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288),
    "qwen3-32b": _qwen3(64, 5120, 64, 25600),
    "gemma3-27b": ModelShape(
        layers=62, hidden=5376, heads=32, kv_heads=16, head_dim=128, ffn=21504, vocabulary=262208, norm_eps=1e-6,
        norm_offset=True, norms="both", embed_scale=5376**0.5, rope_base=1e6, rope=Rotary("linear", factor=8.0),
        window_rope_base=10000.0, context=131072, mlp="geglu_tanh", qk_norm=True, attention_scale=168**-0.5,
        window=1024, window_pattern=(True, True, True, True, True, False), tied=True,
    ),
}  # fmt: skip
"""Values of public configs; of Gemma 3 its text model's."""


def named_shape(name: str, **changes: object) -> ModelShape:
    """The shape of that name with some fields changed; raises ConfigError that names the nearest."""
    if name not in SHAPES:
        raise ConfigError(f"model.name: '{name}' is not known{_nearest(name)}")
    base = SHAPES[name]
    if "hidden" in changes or "heads" in changes:  # derived sizes follow, unless given
        derived = {"head_dim": 0} | ({"kv_heads": 0} if base.kv_heads == base.heads else {})
        changes = derived | changes
    if changes.get("positions") == "learned":  # which are not scaled
        changes = {"rope": Rotary()} | changes
    return replace(base, **changes)  # type: ignore[arg-type]


def _nearest(name: str) -> str:
    """What a user may have meant: of the size that is asked for, where any is."""
    family, size = _split(name)
    of_size = {known: _split(known)[0] for known in SHAPES if size and _split(known)[1] == size}
    if close := get_close_matches(family, of_size.values(), n=1, cutoff=0.5):
        return f"; did you mean '{next(known for known, its in of_size.items() if its == close[0])}'?"
    families = {_split(known)[0] for known in SHAPES} - {""}
    if size and (close := get_close_matches(family, sorted(families), n=2, cutoff=0.6)):
        known = [each for each in SHAPES if _split(each)[0] in close]
        return f"; of its family there are {', '.join(known)}; or give a folder with a config.json"
    return nearest(name, SHAPES)


def _split(name: str) -> tuple[str, str]:
    """`llama3.1-70b` -> its family and its size; "" where it has none."""
    match = re.fullmatch(r"(.*?)-?(\d+(?:\.\d+)?[bm])", name.lower())
    return (match[1], match[2]) if match else (name, "")
