"""Gemma 2, and the text model of Gemma 3: norms before and after of 1 + weight, scaled embeddings, alternating windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helixpipe.errors import ConfigError
from helixpipe.hub.architecture import Architecture, Tensor
from helixpipe.hub.entries import (
    GATED,
    Always,
    AttentionBias,
    Config,
    Dropouts,
    EmbedScale,
    Entry,
    Only,
    Value,
    length,
    sizes,
    typed,
)
from helixpipe.hub.llama import ATTENTION, ENDS, MLP, QK_NORMS
from helixpipe.hub.rope import Rope, RopeByLayer
from helixpipe.hub.window import AllButEvery
from helixpipe.parts.shape import ModelShape


@dataclass(frozen=True)
class QueryScale:
    """Scores are divided by the root of a number, which need not be a head's size."""

    default: float = 256
    keys: tuple[str, ...] = ("query_pre_attn_scalar",)

    def read(self, config: Config) -> dict[str, Any]:
        (key,) = self.keys
        number = typed(key, config.get(key, self.default), "float")
        if not number > 0:
            raise ConfigError(f"{key}: {number:g}; give more than 0")
        return {"attention_scale": number**-0.5}

    def write(self, shape: ModelShape) -> dict[str, Any]:
        exact = shape.attention_scale**-2 if shape.attention_scale else float(shape.head_dim)
        return {self.keys[0]: round(exact) if abs(exact - round(exact)) < 1e-6 else exact}


_SHARED: tuple[Entry, ...] = (
    *sizes(vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8),
    Value("num_key_value_heads", "kv_heads", 4),
    Value("head_dim", "head_dim", 256),
    Value("rms_norm_eps", "norm_eps", 1e-6),
    Value("hidden_activation", "mlp", "gelu_pytorch_tanh", words=GATED),
    Value("tie_word_embeddings", "tied", True),
    QueryScale(),
    EmbedScale(2304),
    AttentionBias(),
    Only("use_bidirectional_attention", False),
    Dropouts(attention_dropout=0.0),
)
_TENSORS = (
    *ENDS,
    *ATTENTION,
    *MLP,
    Tensor("layers.N.input_layernorm", "layers.N.norm"),
    Tensor("layers.N.post_attention_layernorm", "layers.N.proj.norm"),
    Tensor("layers.N.pre_feedforward_layernorm", "layers.N.mlp.norm"),
    Tensor("layers.N.post_feedforward_layernorm", "layers.N.mlp.after"),
)

GEMMA2 = Architecture(
    "gemma2",
    "Gemma2ForCausalLM",
    (
        *_SHARED,
        Value("attn_logit_softcapping", "softcap", 50.0, nullable=True),
        Value("final_logit_softcapping", "head_softcap", 30.0, nullable=True),
        Always(norms="both", norm_offset=True),
        length(8192),
        Rope(length=8192),
        AllButEvery(layers=26, every=2),
    ),
    _TENSORS,
    ignored=("hidden_act", "sliding_window_size"),  # of older configs; hidden_activation and sliding_window are read
)

GEMMA3 = Architecture(
    "gemma3_text",
    "Gemma3ForCausalLM",
    (
        Value("vocab_size", "vocabulary", 262208),
        *(entry for entry in _SHARED if "vocab_size" not in entry.keys),
        Value("attn_logit_softcapping", "softcap", None),
        Value("final_logit_softcapping", "head_softcap", None),
        Always(norms="both", norm_offset=True, qk_norm=True),
        length(131072),
        RopeByLayer(1e6, 1e4, 131072),
        AllButEvery(layers=26, every=6, pattern_key="sliding_window_pattern"),
    ),
    (*_TENSORS, *QK_NORMS),
    ignored=("hidden_act",),
)
