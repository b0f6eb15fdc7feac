"""GPT-2: its linear layers are [in, out] in files, q, k and v are one, and older files hold the mask."""

from __future__ import annotations

from helixpipe.hub.architecture import Architecture, Tensor
from helixpipe.hub.entries import GELU, Always, Dropouts, Only, Value

GPT2 = Architecture(
    "gpt2",
    "GPT2LMHeadModel",
    (
        Value("vocab_size", "vocabulary", 50257),
        Value("n_embd", "hidden", 768),
        Value("n_layer", "layers", 12),
        Value("n_head", "heads", 12),
        Value("n_inner", "ffn", None, null=lambda config: 4 * config.get("n_embd", 768)),
        Value("n_positions", "context", 1024),
        Value("layer_norm_epsilon", "norm_eps", 1e-5),
        Value("activation_function", "mlp", "gelu_new", words=GELU),
        Value("tie_word_embeddings", "tied", True),
        Always(norm="layer", positions="learned", qkv_bias=True, bias=True),
        Only("scale_attn_weights", True),
        Only("scale_attn_by_inverse_layer_idx", False),
        Only("add_cross_attention", False),
        Dropouts(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
    ),
    (
        Tensor("wte", "embed.tokens"),
        Tensor("wpe", "embed.positions"),
        Tensor("h.N.ln_1", "layers.N.norm"),
        Tensor("h.N.attn.c_attn", "layers.N.qkv.q", "layers.N.qkv.k", "layers.N.qkv.v", transposed=True),
        Tensor("h.N.attn.c_proj", "layers.N.proj.o", transposed=True),
        Tensor("h.N.ln_2", "layers.N.mlp.norm"),
        Tensor("h.N.mlp.c_fc", "layers.N.mlp.up", transposed=True),
        Tensor("h.N.mlp.c_proj", "layers.N.mlp.down", transposed=True),
        Tensor("ln_f", "head.norm"),
        Tensor("lm_head", "head.output"),
    ),
    prefix="transformer.",
    buffers=r".*\.attn\.(bias|masked_bias)",
    # reorder_and_upcast_attn asks for a precision, not for another result
    ignored=(
        "n_ctx", "reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation",
        "summary_proj_to_labels", "summary_first_dropout", "summary_last_dropout",
    ),
)  # fmt: skip
