"""Named shapes against the totals that the models' makers publish, and names that are nearly one."""

from __future__ import annotations

import pytest

from helixpipe.errors import ConfigError
from helixpipe.parts.shapes import SHAPES, named_shape

# parameters, as public model cards and indices of weights have them; of Gemma 3 without its vision tower
PUBLISHED = {
    "gpt2": 124_439_808, "smollm2-135m": 134_515_008, "llama3-8b": 8_030_261_248, "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496, "llama3.1-405b": 405_853_388_800, "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360, "qwen3-32b": 32_762_123_264, "gemma3-27b": 27_009_346_304,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    assert SHAPES[name].parameter_count == pytest.approx(PUBLISHED[name], rel=0.01)


def test_llama_and_gemma_know_their_long_contexts() -> None:
    llama, gemma = SHAPES["llama3.1-8b"], SHAPES["gemma3-27b"]
    assert (llama.rope.type, llama.rope.factor, llama.rope.original) == ("llama3", 8.0, 8192)
    assert [gemma.window_of(layer) for layer in range(7)] == [1024] * 5 + [0] + [1024]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("llama3-70b", "did you mean 'llama3.1-70b'?"),
        ("llama-3.1-70b", "did you mean 'llama3.1-70b'?"),
        ("llama3-405b", "did you mean 'llama3.1-405b'?"),
        ("lama3-8b", "did you mean 'llama3-8b'?"),
        ("Qwen3-8B", "did you mean 'qwen3-8b'?"),
        ("llama3", "did you mean 'llama3-8b'?"),
        ("tinny", "did you mean 'tiny'?"),
        ("llama3-13b", "of its family there are llama3-8b, llama3.1-8b, llama3.1-70b, llama3.1-405b; or give a folder with a config.json"),
        ("xyz", "known: tiny, 1.3b, "),
    ],
)  # fmt: skip
def test_a_name_that_is_nearly_one_is_answered_with_one_of_its_size(name: str, answer: str) -> None:
    with pytest.raises(ConfigError) as error:
        named_shape(name)
    assert str(error.value).startswith(f"model.name: '{name}' is not known; {answer}")
