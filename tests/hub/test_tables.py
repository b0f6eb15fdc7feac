"""Tables of architectures against transformers' own config classes: defaults, both spellings, and every refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from saved import BASE, KEYS, hugging_face

from helixpipe.errors import ConfigError
from helixpipe.hub.folder import MAY_CHANGE
from helixpipe.hub.known import ARCHITECTURES, architecture_of, fitting
from helixpipe.parts.rotary import Rotary
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import SHAPES

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def config(name: str, **keys: Any) -> dict[str, Any]:
    return {"model_type": name} | (NO_DROPOUT if name == "gpt2" else {}) | keys


def shape(name: str, **keys: Any) -> ModelShape:
    return ARCHITECTURES[name].read(config(name, **keys))


def theirs(name: str, **keys: Any) -> dict[str, Any]:
    """All that transformers makes of the same keys."""
    found = hugging_face().AutoConfig.for_model(name, **(NO_DROPOUT if name == "gpt2" else {}) | keys)
    said: dict[str, Any] = json.loads(found.to_json_string(use_diff=False))
    return said


def test_tests_know_every_architecture() -> None:
    assert KEYS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_absent_key_is_the_classs_default(name: str) -> None:
    """transformers writes all keys of its default; we read the same from them as from none."""
    assert shape(name) == ARCHITECTURES[name].read(theirs(name))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_read_is_written_and_what_transformers_makes_of_it_is_the_same(name: str) -> None:
    architecture = ARCHITECTURES[name]
    for keys in ({}, KEYS[name]):
        found = shape(name, **keys)
        written = architecture.write(found)
        assert architecture.read(written) == found
        again = theirs(name, **{key: value for key, value in written.items() if key != "model_type"})
        assert architecture.read(again) == found
        assert architecture.write(found, config(name, **keys)) == config(name, **keys)  # nothing has changed


def test_a_field_that_changed_is_all_that_is_written_anew() -> None:
    old = config("llama", rope_theta=5e5, rope_scaling=None, torch_dtype="bfloat16", vocab_size=100)
    stretched = Rotary("yarn", factor=4.0, original=2048)
    found = ARCHITECTURES["llama"].write(replace(shape("llama", **old), rope=stretched), old)
    table = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert found == old | {"rope_scaling": table}  # in the spelling that was there
    new = config("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}, vocab_size=100)
    found = ARCHITECTURES["llama"].write(replace(shape("llama", **new), rope=stretched), new)
    assert found == new | {"rope_parameters": table | {"rope_theta": 5e5}}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("phi3", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
        ("modernbert", {"global_rope_theta": 1e5, "local_rope_theta": 1e4}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ],
)
def test_older_spellings_stay_when_a_base_changes(name: str, keys: dict[str, Any]) -> None:
    old = config(name, **keys)
    changed = replace(shape(name, **keys), rope_base=7e5)
    found = ARCHITECTURES[name].write(changed, old)
    assert "rope_parameters" not in found
    assert ARCHITECTURES[name].read(found) == changed
    assert (
        ARCHITECTURES[name].read(theirs(name, **{key: value for key, value in found.items() if key != "model_type"}))
        == changed
    )


def test_a_longer_length_leaves_what_hangs_on_the_old_one() -> None:
    """An original length that is not said is the longest one: once that grows it must be said."""
    old = config("llama", rope_scaling={"type": "yarn", "factor": 2.0}, max_position_embeddings=4096)
    found = ARCHITECTURES["llama"].write(replace(shape("llama", **old), context=8192), old)
    assert found["max_position_embeddings"] == 8192
    assert found["rope_scaling"]["original_max_position_embeddings"] == 4096


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16.0, "truncate": False},
    {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    {
        "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 1024,
        "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
    },
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_both_spellings_of_rotary_scaling_are_one(scaling: dict[str, Any]) -> None:
    new = shape("llama", rope_parameters={"rope_theta": 5e5} | scaling)
    older = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    assert shape("llama", rope_theta=5e5, rope_scaling=older) == new
    assert ARCHITECTURES["llama"].read(theirs("llama", rope_theta=5e5, rope_scaling=older)) == new
    assert (new.rope_base, new.rope.type, new.rope.factor) == (5e5, scaling["rope_type"], scaling["factor"])
    original = scaling.get("original_max_position_embeddings", 2048 if new.rope.type == "dynamic" else None)
    assert new.rope.original == original  # dynamic: of the default length


def test_phi_says_its_original_length_beside_and_partial_rotation() -> None:
    numbers = {"short_factor": [1.0] * 24, "long_factor": [2.0] * 24}
    keys = {
        "rope_scaling": {"type": "longrope"} | numbers, "original_max_position_embeddings": 4096, "rope_theta": 1e4,
        "max_position_embeddings": 131072, "partial_rotary_factor": 0.5,
    }  # fmt: skip
    found = shape("phi3", **keys)
    assert (found.rope.type, found.rope.original, found.rope.factor, found.rotary_share) == (
        "longrope",
        4096,
        32.0,
        0.5,
    )
    assert ARCHITECTURES["phi3"].read(theirs("phi3", **keys)) == found
    assert ARCHITECTURES["phi3"].read(ARCHITECTURES["phi3"].write(found)) == found
    assert shape("phi3", **keys | {"rope_scaling": {"type": "su"} | numbers}) == found  # an older name


def test_rotary_positions_by_kind_of_layer() -> None:
    old = shape(
        "gemma3_text", rope_theta=2e6, rope_local_base_freq=3e4, rope_scaling={"rope_type": "linear", "factor": 8.0}
    )
    assert (old.rope_base, old.window_rope_base, old.rope) == (2e6, 3e4, Rotary("linear", factor=8.0))
    new = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
    assert shape("gemma3_text", rope_parameters=new) == old
    bert = shape("modernbert", global_rope_theta=1.5e5, local_rope_theta=2e4)
    assert (bert.rope_base, bert.window_rope_base, bert.causal) == (1.5e5, 2e4, False)


def windows(found: ModelShape) -> list[int]:
    return [found.window_of(layer) for layer in range(found.layers)]


def test_windows() -> None:
    """transformers' `layer_types` are the truth of which layers have one."""
    qwen = {"num_hidden_layers": 6, "sliding_window": 64, "max_window_layers": 4}
    assert windows(shape("qwen2", **qwen)) == [0] * 6  # a window that is given may be unused
    assert windows(shape("qwen2", **qwen, use_sliding_window=True)) == [0] * 4 + [64] * 2
    assert windows(shape("mistral", num_hidden_layers=2)) == [4096] * 2
    assert windows(shape("mistral", num_hidden_layers=2, sliding_window=None)) == [0] * 2
    assert windows(shape("phi3", num_hidden_layers=2, sliding_window=7)) == [7] * 2
    assert windows(shape("gemma2", num_hidden_layers=5, sliding_window=9)) == [9, 0, 9, 0, 9]
    gemma3 = shape("gemma3_text", num_hidden_layers=62, sliding_window=9)
    assert gemma3.window_pattern == (True,) * 5 + (False,)
    assert windows(shape("gemma3_text", num_hidden_layers=4, sliding_window_pattern=2)) == [4096, 0] * 2
    bert = shape("modernbert", num_hidden_layers=5)
    assert windows(bert) == [0, 65, 65, 0, 65]  # |i - j| <= 64
    for name, keys in (("gemma2", {"sliding_window": 9}), ("gemma3_text", {}), ("modernbert", {}), ("qwen3", qwen)):
        types = theirs(name, **{"num_hidden_layers": 7} | keys)["layer_types"]
        assert [bool(size) for size in windows(shape(name, **{"num_hidden_layers": 7} | keys))] == [
            each == "sliding_attention" for each in types
        ]


def test_numbers_that_null_means_something_for() -> None:
    assert shape("llama", num_attention_heads=8, hidden_size=64, num_key_value_heads=None).kv_heads == 8
    assert shape("gpt2", n_embd=48, n_inner=None).ffn == 192
    assert shape("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None).softcap == 0
    assert shape("gemma2").attention_scale == 0  # 256 ** -0.5 is what heads of 256 have anyway
    assert shape("gemma2", query_pre_attn_scalar=144).attention_scale == pytest.approx(1 / 12)


def test_notes_of_who_wrote_a_config_change_nothing() -> None:
    assert shape("llama", _model_name_or_path="a", _unknown=3) == shape("llama")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"num_local_experts": 8}, "num_local_experts: 8 is not known of llama, and may change what it computes; remove the key if it does not"),
    ("llama", {"attention_sink_size": 4}, "attention_sink_size: 4 is not known of llama"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: its weights are quantised; save it with whole weights"),
    ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu' is not known; known: silu, swish, gelu, gelu_pytorch_tanh, gelu_new"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout: nothing is dropped out here, and this model trains with attention_dropout 0.1; write 0.0 for it into the config to train without"),
    ("gpt2", {"embd_pdrop": 0.2, "attn_pdrop": 0.1}, "embd_pdrop: nothing is dropped out here, and this model trains with embd_pdrop 0.2, attn_pdrop 0.1; write 0.0 for each"),
    ("llama", {"mlp_bias": True}, "mlp_bias: true is not computed here, false alone is; use another model"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: false is not computed here, true alone is"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: true is not computed here"),
    ("modernbert", {"decoder_bias": False}, "decoder_bias: false is not computed here"),
    ("llama", {"hidden_size": "big"}, 'hidden_size: "big" will not do; it is a whole number'),
    ("llama", {"hidden_size": None}, "hidden_size: null will not do; it is a whole number"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings: 1 will not do; it is true or false"),
    ("llama", {"hidden_size": 10, "num_attention_heads": 3}, "model.heads: 3 heads do not divide hidden size 10"),
    ("llama", {"rope_scaling": {"type": "fancy"}}, "rope_scaling.rope_type: 'fancy' is not known"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: linear needs it, and it is not given"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "rope_scaling.mrope_section: [1] is not known; known: factor, original_max_position_embeddings"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": "x"}}, 'rope_scaling.original_max_position_embeddings: "x" will not do; it is a whole number'),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "x"}}, "a value is not a number"),
    ("llama", {"rope_scaling": 4}, "rope_scaling: 4 will not do; it is a table"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 4.0}}, "rope_scaling: it and rope_parameters do not say the same; leave one of them"),
    ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta: 500000.0, and rope_parameters.rope_theta 10000.0; leave one of them"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5; this architecture rotates whole heads"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention: all layers have the same rotary positions in this architecture"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type: 'linear' is not known of this architecture; known: default, longrope"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.rope_theta: not known here; this architecture has them for full_attention and sliding_attention"),
    ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.sliding_attention.rope_type: 'linear'; positions in layers with a window are never scaled here"),
    ("qwen2", {"layer_types": ["full_attention"]}, 'layer_types: ["full_attention"] will not do; it names a type for each of 32 layers'),
    ("qwen2", {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "layer_types: 'chunked_attention' is not known; known: full_attention, sliding_attention"),
    ("qwen2", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "layer_types: sliding_attention is asked for, and use_sliding_window or sliding_window is off"),
    ("gemma2", {"sliding_window": None}, "sliding_window: null, and layer_types asks for sliding_attention; give the tokens"),
    ("mistral", {"sliding_window": 0}, "sliding_window: 0; give at least 1, or null for none"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern: 0; give at least 1"),
    ("modernbert", {"global_attn_every_n_layers": 0}, "global_attn_every_n_layers: 0; give at least 1"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: 0; give more than 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "message"), REFUSED, ids=lambda each: str(each)[:40])
def test_what_a_config_asks_for_and_is_not_there_is_refused_by_its_key(
    name: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        shape(name, **keys)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_changes_nothing_is_passed_over() -> None:
    """Also keys that are not known and are off."""
    keys = {"num_local_experts": None, "use_qk_norm": False, "pruned_heads": {}, "use_cache": True, "bos_token_id": 1}
    assert shape("llama", **keys) == shape("llama")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "model_type: missing; known: llama, qwen2, qwen3, mistral, phi3, gemma2, gemma3_text, olmo2, gpt2, modernbert"),
        ({"model_type": "mamba"}, 'model_type: "mamba" is not known; known: llama, qwen2,'),
        ({"model_type": "gemma3"}, "model_type: 'gemma3' is of images too; save its text model alone, which is 'gemma3_text'"),
    ],
)  # fmt: skip
def test_an_architecture_that_is_not_known(found: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        architecture_of(found)
    assert message in str(error.value)


def test_a_model_of_ones_own_is_written_as_the_architecture_that_fits() -> None:
    kinds = {
        "gpt2": "gpt2", "smollm2-135m": "llama", "llama3.1-70b": "llama", "mistral-7b": "llama", "qwen2.5-32b": "qwen2",
        "qwen3-8b": "qwen3", "gemma3-27b": "gemma3_text",
    }  # fmt: skip
    assert {name: fitting(SHAPES[name]).name for name in kinds} == kinds
    assert fitting(replace(SHAPES["llama3-8b"], window=512)).name == "mistral"
    assert fitting(replace(SHAPES["llama3-8b"], rotary_share=0.5)).name == "phi3"
    with pytest.raises(ConfigError) as error:
        fitting(SHAPES["tiny"])
    assert (
        str(error.value) == "no architecture has this model: the nearest is llama, which cannot have model.mlp 'gelu'"
    )
    with pytest.raises(ConfigError) as error:
        ARCHITECTURES["llama"].write(replace(SHAPES["llama3-8b"], window=512))
    assert str(error.value) == "model.window: 512; no config of llama can say so"


def test_every_parameter_has_one_place_and_every_tensor_is_full() -> None:
    for name, architecture in ARCHITECTURES.items():
        found = shape(name, **{key: value for key, value in (BASE | KEYS[name]).items() if key in architecture.keys})
        rows: dict[str, int] = {}
        for place in architecture.places(found).values():
            turned = place.size[::-1] if place.transposed else place.size
            assert 0 <= place.start < place.stop <= turned[0]
            rows[place.tensor] = rows.get(place.tensor, 0) + place.stop - place.start
        sizes = {place.tensor: place for place in architecture.places(found).values()}
        assert all(rows[tensor] == (p.size[::-1] if p.transposed else p.size)[0] for tensor, p in sizes.items())


def test_what_may_change_has_no_weights() -> None:
    """Nothing that a key of these changes is a size of any parameter."""
    base = SHAPES["qwen3-8b"]
    other = replace(
        base, rope=Rotary("linear", factor=2.0), rope_base=1.0, window_rope_base=2.0, window=3, window_pattern=(True, False),
        norm_eps=1e-3, softcap=4.0, head_softcap=5.0, attention_scale=6.0, causal=False, context=7,
    )  # fmt: skip
    assert all(getattr(base, name) != getattr(other, name) for name in MAY_CHANGE)
    assert all(base.parameters(part) == other.parameters(part) for part in base.chain())
