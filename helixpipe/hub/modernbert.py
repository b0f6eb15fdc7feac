"""ModernBERT, a bidirectional encoder: a norm of the embedding in the place of layer 0's, local attention in two of three
layers, and a transform before the logits."""

from __future__ import annotations

from helixpipe.hub.architecture import Architecture, Tensor
from helixpipe.hub.entries import Always, Dropouts, Only, Value, length, sizes
from helixpipe.hub.rope import RopeByLayer
from helixpipe.hub.window import ToEitherSide

MODERNBERT = Architecture(
    "modernbert",
    "ModernBertForMaskedLM",
    (
        *sizes(
            vocab_size=50368, hidden_size=768, intermediate_size=1152, num_hidden_layers=22, num_attention_heads=12
        ),
        Value("hidden_activation", "mlp", "gelu", words={"gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}),
        Value("norm_eps", "norm_eps", 1e-5),
        Value("norm_bias", "norm_bias", False),
        Value("tie_word_embeddings", "tied", True),
        Always(norm="layer", causal=False, embed_norm=True, head_transform=True),
        Only("attention_bias", False),
        Only("mlp_bias", False),
        Only("classifier_bias", False),
        Only("classifier_activation", "gelu"),
        Only("decoder_bias", True),
        Only("position_embedding_type", "absolute"),  # of older configs, which never read it
        length(8192),
        RopeByLayer(160000.0, 10000.0, 8192, "global_rope_theta", "local_rope_theta", scales_windows=True),
        ToEitherSide(layers=22),
        Dropouts(attention_dropout=0.0, embedding_dropout=0.0, mlp_dropout=0.0),
    ),
    (
        Tensor("embeddings.tok_embeddings", "embed.tokens"),
        Tensor("embeddings.norm", "embed.norm"),
        Tensor("layers.N.attn_norm", "layers.N.norm"),
        Tensor("layers.N.attn.Wqkv", "layers.N.qkv.q", "layers.N.qkv.k", "layers.N.qkv.v"),
        Tensor("layers.N.attn.Wo", "layers.N.proj.o"),
        Tensor("layers.N.mlp_norm", "layers.N.mlp.norm"),
        Tensor("layers.N.mlp.Wi", "layers.N.mlp.gate", "layers.N.mlp.up"),
        Tensor("layers.N.mlp.Wo", "layers.N.mlp.down"),
        Tensor("final_norm", "head.norm"),
        Tensor("head.dense", "head.dense"),
        Tensor("head.norm", "head.dense_norm"),
        Tensor("decoder", "head.output"),
        Tensor("decoder", "head"),  # whose bias is the head's own, whosever the table is
    ),
    outside=("head.", "decoder"),
    tied="decoder.weight",
    # what training does with masks, classifiers and kernels is not the model's
    ignored=(
        "initializer_cutoff_factor", "classifier_pooling", "classifier_dropout", "deterministic_flash_attn",
        "sparse_prediction", "sparse_pred_ignore_index", "reference_compile", "repad_logits_with_grad",
        "layer_norm_eps",
    ),
)  # fmt: skip
