"""Rotary scalings against transformers' own functions, type by type, and the keys that are refused."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wide import Wide

import helixpipe as hp
from helixpipe.config import Config
from helixpipe.config_text import build_config, merged, parse_arguments, write_toml
from helixpipe.model.rope import Rope, Ropes
from helixpipe.parts.rotary import TYPES, Rotary
from helixpipe.train.manifest import Manifest, check_shape, read_manifest

# keys of transformers that have another name here
THEIRS = {"original": "original_max_position_embeddings", "type": "rope_type"}
NUMBERS = tuple(1.0 + 0.1 * i for i in range(16))
ROTARIES = [
    Rotary(),
    Rotary("linear", factor=4.0),
    Rotary("dynamic", factor=2.0, original=2048),
    Rotary("dynamic", factor=8.0, original=16),
    Rotary("yarn", factor=4.0, original=8192),
    Rotary("yarn", factor=40.0, original=4096, beta_fast=16, beta_slow=2, mscale=0.707, mscale_all_dim=1.0),
    Rotary("yarn", factor=16.0, original=32768, attention_factor=1.3, truncate=False),
    Rotary("yarn", factor=2.0, original=8, mscale=0.5),
    Rotary("yarn", factor=0.5, original=2048, truncate=True),
    Rotary("llama3", factor=8.0, original=8192, low_freq_factor=1.0, high_freq_factor=4.0),
    Rotary("llama3", factor=32.0, original=64, low_freq_factor=0.5, high_freq_factor=8.0),
    Rotary("longrope", original=4096, factor=32.0, short_factor=NUMBERS, long_factor=NUMBERS[::-1]),
    Rotary("longrope", original=64, attention_factor=1.19, short_factor=NUMBERS, long_factor=NUMBERS[::-1]),
    Rotary("longrope", original=64, factor=0.5, short_factor=NUMBERS, long_factor=NUMBERS[::-1]),
]
DIM = 32
LENGTHS = (1, 16, 64, 65, 2048, 2049, 8191, 131072)


def theirs(rotary: Rotary, share: float, base: float, length: int, dim: int = DIM) -> tuple[Tensor, float]:
    """Frequencies and factor of transformers for a model of one head of `dim / share`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    keys = {
        THEIRS.get(key, key): list(value) if isinstance(value, tuple) else value for key, value in rotary.given.items()
    }
    if rotary.type == "dynamic":
        del keys["original_max_position_embeddings"]
    config = LlamaConfig(
        hidden_size=round(dim / share), num_attention_heads=1, max_position_embeddings=rotary.original or 2048,
        rope_parameters={"rope_type": rotary.type, "rope_theta": base, "partial_rotary_factor": share, **keys},
    )  # fmt: skip
    if rotary.type == "default":
        return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim), 1.0
    found, factor = ROPE_INIT_FUNCTIONS[rotary.type](config, seq_len=length)
    return found, float(factor)


@pytest.mark.parametrize("rotary", ROTARIES, ids=lambda r: f"{r.type}-{ROTARIES.index(r)}")
def test_frequencies_are_those_of_transformers(rotary: Rotary) -> None:
    """They compute in float32: to that, and to float64 where each float32 that they ask for is float64."""
    for wide, relative in ((False, 2e-6), (True, 1e-13)):
        for base, share, length in [(b, s, n) for b in (1e4, 5e5, 37.0) for s in (1.0, 0.5) for n in LENGTHS]:
            with Wide() if wide else nullcontext():
                expected, factor = theirs(rotary, share, base, length)
            assert expected.dtype == (torch.float64 if wide else torch.float32)
            found = torch.tensor(rotary.frequencies(DIM, base, length), dtype=torch.float64)
            assert found.shape == expected.shape
            assert ((found - expected).abs() <= relative * expected.abs()).all(), (base, share, length)
            assert math.isclose(rotary.magnitude, factor, rel_tol=1e-15)


def test_every_type_is_compared() -> None:
    assert {rotary.type for rotary in ROTARIES} == set(TYPES)
    given = {key for rotary in ROTARIES for key in rotary.given}
    assert given == {key for keys in TYPES.values() for key in (*keys.needs, *keys.takes)}


def test_an_odd_number_is_rounded_up_as_there() -> None:
    expected, _ = theirs(Rotary("linear", factor=2.0), 0.5, 1e4, 1, dim=15)
    assert Rotary("linear", factor=2.0).frequencies(15, 1e4, 1) == pytest.approx(expected.tolist(), rel=1e-6)


def test_which_frequencies_depend_on_the_length() -> None:
    """And sequences of one reach have the same ones."""
    for rotary in ROTARIES:
        by_reach: dict[int, set[tuple[float, ...]]] = {}
        for length in LENGTHS:
            by_reach.setdefault(rotary.reach(length), set()).add(rotary.frequencies(DIM, 1e4, length))
        assert all(len(found) == 1 for found in by_reach.values())
        assert (len(by_reach) > 1) == rotary.by_length


def rotated(rope: Rope, x: Tensor, start: int, length: int) -> Tensor:
    """Written out: pairs as complex numbers."""
    size = -(-rope.dim // 2)
    angles = torch.tensor([[(start + i) * f for f in rope.rotary.frequencies(rope.dim, rope.base, length)]
                           for i in range(x.shape[1])], dtype=torch.float64).unsqueeze(1)  # fmt: skip
    turn = torch.polar(torch.full_like(angles, rope.rotary.magnitude), angles)
    made = torch.complex(x[..., :size], x[..., size : 2 * size]) * turn
    return torch.cat((made.real, made.imag, x[..., 2 * size :]), -1)


@pytest.mark.parametrize("dim", [8, 6, 5, 2])
def test_the_first_numbers_of_a_head_are_rotated_and_the_rest_pass(dim: int) -> None:
    rope = Rope(dim, 100.0, Rotary("yarn", factor=2.0, original=4))
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    out, expected = rope(x, 7, 12), rotated(rope, x, 7, 12)
    assert torch.allclose(out, expected, rtol=0, atol=1e-14)
    weights = torch.randn_like(out)
    (found,), (wanted,) = (torch.autograd.grad((made * weights).sum(), x) for made in (out, expected))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rotary", ROTARIES, ids=lambda r: f"{r.type}-{ROTARIES.index(r)}")
def test_pieces_of_a_sequence_are_turned_as_the_whole_is(rotary: Rotary) -> None:
    """Also where a rank has every other token; another length in between disturbs nothing."""
    rope = Rope(DIM, 1e4, rotary)
    x = torch.randn(1, 3000, 1, DIM, dtype=torch.float64)
    whole = rope(x, 0, 3000)
    assert torch.equal(whole, rope(x, 0))  # it ends with these tokens
    for start, length in ((0, 40), (40, 2960)):
        rope(x[:, :60], 0, 60)
        assert torch.equal(rope(x[:, start : start + length], start, 3000), whole[:, start : start + length])
    places = torch.arange(0, 2000, 2)
    assert torch.equal(rope(x[:, places], places, 3000), whole[:, places])
    assert torch.allclose(rope(x[:, :60], 0, 60), rotated(rope, x[:, :60], 0, 60), rtol=0, atol=1e-12)


def test_tables_of_another_length_are_others_only_where_it_matters() -> None:
    cpu = torch.device("cpu")
    for rotary, same in ((ROTARIES[1], True), (ROTARIES[3], False)):
        rope = Rope(DIM, 1e4, rotary)
        first, second = (rope.table(0, 8, cpu, torch.float64, n)[0] for n in (32, 64))
        assert (first is second) == same


def test_layers_with_a_window_have_a_base_of_their_own_and_no_scaling() -> None:
    linear = Rotary("linear", factor=8.0)
    shape = hp.ModelShape(
        layers=4, hidden=16, heads=2, ffn=16, vocabulary=16, rope_base=1e6, rope=linear, window=4,
        window_pattern=(True, False), window_rope_base=1e4,
    )  # fmt: skip
    assert [shape.rotary_of(layer) for layer in range(4)] == [(1e4, Rotary()), (1e6, linear)] * 2
    ropes = Ropes(shape)
    assert ropes.of(0) is ropes.of(2)
    assert ropes.of(1) is ropes.of(3)
    n = torch.randn(1, 6, 16)
    first, second = (hp.Decoder(shape).part(hp.Part("qkv", layer)) for layer in (0, 1))
    second.load_state_dict(first.state_dict())
    q, other, plain = first(n, 3, 9)[0], second(n, 3, 9)[0], first.q(n).unflatten(-1, (2, 8))
    assert torch.allclose(q, Rope(8, 1e4)(plain, 3))
    assert torch.allclose(other, Rope(8, 1e6, linear)(plain, 3))
    assert not torch.allclose(q, other)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "yarm"}, "model.rope.type: 'yarm' is not known; did you mean 'yarn'?"),
    ({"type": "linear"}, "model.rope.factor: linear needs it, and it is not given"),
    ({"type": "linear", "factor": 0.0}, "model.rope.factor: 0; give more than 0"),
    ({"type": "linear", "factor": -2.0}, "model.rope.factor: -2; give more than 0"),
    ({"type": "linear", "factor": math.inf}, "model.rope.factor: inf; give more than 0"),
    ({"type": "linear", "factor": 2.0, "original": 8}, "model.rope.original: linear has no such key, it takes factor"),
    (
        {"factor": 2.0},
        "model.rope.factor: default has no such key, it takes no keys: give model.rope.type too",
    ),
    ({"type": "yarn", "factor": 2.0}, "model.rope.original: yarn needs it, and it is not given"),
    ({"type": "yarn", "factor": 2.0, "original": 1}, "model.rope.original: 1; give at least 2 tokens"),
    (
        {"type": "yarn", "factor": 2.0, "original": 64, "beta_slow": 40},
        "model.rope.beta_fast: 32 is below beta_slow 40; give at least as much",
    ),
    (
        {"type": "yarn", "factor": 2.0, "original": 64, "short_factor": (1.0,)},
        "model.rope.short_factor: yarn has no such key, it takes factor, original, attention_factor, beta_fast, beta_slow, "
        "mscale, mscale_all_dim, truncate",
    ),
    (
        {"type": "llama3", "factor": 2.0, "original": 64, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        "model.rope.high_freq_factor: 4 is not above low_freq_factor 4; raise it",
    ),
    (
        {"type": "longrope", "original": 64, "short_factor": (1.0,), "long_factor": (1.0, 0.0)},
        "model.rope.long_factor: 0; give more than 0",
    ),
    (
        {"type": "longrope", "original": 64, "short_factor": (1.0,), "long_factor": (1.0,)},
        "model.rope.factor: longrope needs it or attention_factor; give the longest length over the original one",
    ),
]


@pytest.mark.parametrize(
    ("keys", "message"), REFUSED, ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else ""
)
def test_keys_that_cannot_be_are_refused_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(hp.ConfigError) as caught:
        Rotary(**keys)
    assert str(caught.value) == message


TINY: dict[str, Any] = {"layers": 1, "hidden": 16, "heads": 2, "ffn": 16, "vocabulary": 16}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"rope": Rotary("longrope", original=64, factor=2.0, short_factor=(1.0,) * 4, long_factor=(1.0,) * 3)},
            "model.rope.long_factor: 3 numbers, and 8 of a head are rotated; give 4",
        ),
        (
            {"rope": Rotary("dynamic", factor=2.0, original=64), "rotary_share": 0.3},
            "model.rope.type: dynamic rotates 4 numbers of a head at least, and here are 2",
        ),
        (
            {"rope": Rotary("yarn", factor=2.0, original=64), "rope_base": 1.0},
            "model.rope_base: 1; yarn needs more than 1",
        ),
        (
            {"rope": Rotary("linear", factor=2.0), "positions": "learned", "context": 8},
            "model.rope.type: linear scales rotary positions, and these are learned; "
            "remove model.rope or set model.positions to rope",
        ),
        ({"rotary_share": 0.0}, "model.rotary_share: 0; give more than 0 and at most 1"),
        ({"rotary_share": 1.5}, "model.rotary_share: 1.5; give more than 0 and at most 1"),
        ({"rotary_share": 0.1}, "model.rotary_share: 0.1 of a head of 8 is no number; raise it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_shape_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(hp.ConfigError) as caught:
        hp.ModelShape(**TINY | keys)
    assert str(caught.value) == message


def config(*words: str, **model: Any) -> Config:
    return build_config(merged({"model": model}, parse_arguments(words).overrides))


def test_keys_of_a_config() -> None:
    """With a type they are all there is, and `original` is what the model was made for; without, they change its own."""
    words = ("--model.rope.type", "yarn", "--model.rope.factor", "4", "--model.context", "512")
    assert config(*words).shape().rope == Rotary("yarn", factor=4.0, original=512)
    assert config(*words, "--model.rope.original", "128").shape().rope.original == 128
    given = config(rope={"type": "yarn", "factor": 4.0, "original": 64, "beta_fast": 8.0})
    assert given.shape().rope == Rotary("yarn", factor=4.0, original=64, beta_fast=8.0)
    assert '[model.rope]\ntype = "yarn"\nfactor = 4.0\noriginal = 64\nbeta_fast = 8.0\n' in write_toml(given)
    changed = config("--model.rope.factor", "2", rope={"type": "yarn", "factor": 4.0, "original": 64})
    assert changed.shape().rope == Rotary("yarn", factor=2.0, original=64)
    other = config(
        "--model.rope.type", "linear", "--model.rope.factor", "3", rope={"type": "yarn", "factor": 4.0, "original": 64}
    )
    assert other.shape().rope == Rotary("linear", factor=3.0)
    own = Rotary("llama3", factor=8.0, original=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert own.with_keys({"factor": 16.0}).factor == 16.0
    assert own.with_keys({"type": "yarn", "factor": 2.0}, 131072) == Rotary("yarn", factor=2.0, original=8192)
    lists = config("--model.rope.short_factor", ",".join(["1"] * 16), "--model.rope.long_factor", ",".join(["2"] * 16),
                   "--model.rope.type", "longrope", "--model.rope.original", "64", "--model.rope.factor", "2")  # fmt: skip
    assert lists.shape().rope.long_factor == (2.0,) * 16


def test_a_type_without_its_keys_is_refused_in_a_config() -> None:
    with pytest.raises(hp.ConfigError) as caught:
        config("--model.rope.type", "yarn", "--model.rope.factor", "4")
    assert str(caught.value) == "model.rope.original: yarn needs it, and it is not given"
    with pytest.raises(hp.ConfigError) as caught:
        config("--model.rope.type", "proportional")
    assert str(caught.value).startswith("--model.rope.type: 'proportional' is not known")


def test_the_guide_has_every_type_with_its_keys() -> None:
    page = (Path(__file__).parents[2] / "docs/guide/stretching.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    told = {row[0].strip("`"): {*re.findall(r"`(\w+)`", row[2])} | {*re.findall(r"`(\w+)`", row[3])} for row in rows}
    assert told == {name: {*keys.needs, *keys.takes} for name, keys in TYPES.items()}


def test_a_run_may_go_on_with_other_positions(tmp_path: Path) -> None:
    """They have no weights. Numbers in lists come back from a manifest as lists."""
    rotary = Rotary("longrope", original=64, factor=2.0, short_factor=(1.0,) * 16, long_factor=(2.0,) * 16)
    shape = dataclasses.replace(Config().shape(), rope=rotary)
    written = Manifest(1, dataclasses.asdict(shape), {}, {}).to_json()
    (tmp_path / "manifest.json").write_text(written)
    saved = read_manifest(tmp_path)
    for other in (shape, dataclasses.replace(shape, rope=ROTARIES[1], rope_base=5e5)):
        check_shape(saved, other, tmp_path)
    with pytest.raises(hp.CheckpointError, match=r"its model\.rotary_share is 1\.0, and the config's 0\.5"):
        check_shape(saved, dataclasses.replace(Config().shape(), rotary_share=0.5), tmp_path)
