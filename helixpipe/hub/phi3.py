"""Phi-3 and Phi-4: Llama's layers with fused matrices, and partly rotated heads."""

from __future__ import annotations

from helixpipe.hub.architecture import Architecture, Tensor
from helixpipe.hub.entries import Dropouts, Only, Value, length, sizes
from helixpipe.hub.llama import ACTIVATION, ENDS, NORMS, UNTIED, even
from helixpipe.hub.rope import Rope
from helixpipe.hub.window import EveryLayer

PHI3 = Architecture(
    "phi3",
    "Phi3ForCausalLM",
    (
        *sizes(
            vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32
        ),
        Value("num_key_value_heads", "kv_heads", None),
        Value("head_dim", "head_dim", None, implied=even),
        Value("rms_norm_eps", "norm_eps", 1e-5),
        ACTIVATION,
        UNTIED,
        length(4096),
        Rope(length=4096, original=4096, partial=True, types=("default", "longrope")),
        EveryLayer(None),
        Only("full_attn_mod", 1),  # of Phi-4-mini, which no class reads
        Only("interpolate_factor", 1),
        Only("attention_bias", False),
        Dropouts(attention_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    ),
    (
        *ENDS,
        *NORMS,
        Tensor("layers.N.self_attn.qkv_proj", "layers.N.qkv.q", "layers.N.qkv.k", "layers.N.qkv.v"),
        Tensor("layers.N.self_attn.o_proj", "layers.N.proj.o"),
        Tensor("layers.N.mlp.gate_up_proj", "layers.N.mlp.gate", "layers.N.mlp.up"),
        Tensor("layers.N.mlp.down_proj", "layers.N.mlp.down"),
    ),
)
