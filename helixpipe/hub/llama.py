"""Llama, and what is built as it is: Qwen2 and 2.5, Qwen3, Mistral, OLMo-2."""

from __future__ import annotations

from helixpipe.hub.architecture import Architecture, Tensor
from helixpipe.hub.entries import GATED, Always, AttentionBias, Dropouts, Only, Value, length, sizes
from helixpipe.hub.rope import Rope
from helixpipe.hub.window import EveryLayer, FromLayer
from helixpipe.parts.shape import ModelShape


def even(shape: ModelShape) -> int:
    """A head's size that need not be said."""
    return shape.hidden // shape.heads


ATTENTION = (
    Tensor("layers.N.self_attn.q_proj", "layers.N.qkv.q"),
    Tensor("layers.N.self_attn.k_proj", "layers.N.qkv.k"),
    Tensor("layers.N.self_attn.v_proj", "layers.N.qkv.v"),
    Tensor("layers.N.self_attn.o_proj", "layers.N.proj.o"),
)
MLP = (
    Tensor("layers.N.mlp.gate_proj", "layers.N.mlp.gate"),
    Tensor("layers.N.mlp.up_proj", "layers.N.mlp.up"),
    Tensor("layers.N.mlp.down_proj", "layers.N.mlp.down"),
)
ENDS = (
    Tensor("embed_tokens", "embed.tokens"),
    Tensor("norm", "head.norm"),
    Tensor("lm_head", "head.output"),
)
NORMS = (
    Tensor("layers.N.input_layernorm", "layers.N.norm"),
    Tensor("layers.N.post_attention_layernorm", "layers.N.mlp.norm"),
)
QK_NORMS = (
    Tensor("layers.N.self_attn.q_norm", "layers.N.qkv.q_norm"),
    Tensor("layers.N.self_attn.k_norm", "layers.N.qkv.k_norm"),
)
ACTIVATION = Value("hidden_act", "mlp", "silu", words=GATED)
UNTIED = Value("tie_word_embeddings", "tied", False)

LLAMA = Architecture(
    "llama",
    "LlamaForCausalLM",
    (
        *sizes(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
        ),
        Value("num_key_value_heads", "kv_heads", None),
        Value("head_dim", "head_dim", None, implied=even),
        Value("rms_norm_eps", "norm_eps", 1e-6),
        ACTIVATION,
        UNTIED,
        length(2048),
        Rope(length=2048),
        AttentionBias(),
        Only("mlp_bias", False),
        Dropouts(attention_dropout=0.0),
    ),
    (*ENDS, *NORMS, *ATTENTION, *MLP),
)

_QWEN = sizes(
    vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32
)

QWEN2 = Architecture(
    "qwen2",
    "Qwen2ForCausalLM",
    (
        *_QWEN,
        Value("num_key_value_heads", "kv_heads", 32, nullable=True),
        Value("head_dim", "head_dim", None, implied=even),
        Value("rms_norm_eps", "norm_eps", 1e-6),
        ACTIVATION,
        UNTIED,
        length(32768),
        Rope(length=32768),
        FromLayer(32),
        Always(qkv_bias=True),
        Dropouts(attention_dropout=0.0),
    ),
    LLAMA.tensors,
)

QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    (
        *_QWEN,
        Value("num_key_value_heads", "kv_heads", 32, nullable=True),
        Value("head_dim", "head_dim", 128),
        Value("rms_norm_eps", "norm_eps", 1e-6),
        ACTIVATION,
        UNTIED,
        length(32768),
        Rope(length=32768),
        FromLayer(32),
        Always(qk_norm=True),
        AttentionBias(),
        Dropouts(attention_dropout=0.0),
    ),
    (*LLAMA.tensors, *QK_NORMS),
)

MISTRAL = Architecture(
    "mistral",
    "MistralForCausalLM",
    (
        *sizes(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
        ),
        Value("num_key_value_heads", "kv_heads", 8, nullable=True),
        Value("head_dim", "head_dim", None, implied=even),
        Value("rms_norm_eps", "norm_eps", 1e-6),
        ACTIVATION,
        UNTIED,
        length(131072),
        Rope(length=131072),
        EveryLayer(4096),
        Dropouts(attention_dropout=0.0),
    ),
    LLAMA.tensors,
)

OLMO2 = Architecture(
    "olmo2",
    "Olmo2ForCausalLM",
    (
        *sizes(
            vocab_size=50304, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
        ),
        Value("num_key_value_heads", "kv_heads", None),
        Value("head_dim", "head_dim", None, implied=even),
        Value("rms_norm_eps", "norm_eps", 1e-5),
        ACTIVATION,
        UNTIED,
        length(2048),
        Rope(length=2048),
        Always(norms="after", qk_norm=True, qk_norm_over="width"),
        AttentionBias(),
        Dropouts(attention_dropout=0.0),
    ),
    (
        *ENDS,
        *ATTENTION,
        *QK_NORMS,
        *MLP,
        Tensor("layers.N.post_attention_layernorm", "layers.N.proj.norm"),
        Tensor("layers.N.post_feedforward_layernorm", "layers.N.mlp.after"),
    ),
)
