"""Order and mixtures: every thing once, whatever its number; and sources by weight, in closed form."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import printed

from helixpipe.train.mixture import Mixture
from helixpipe.train.order import Permutation, drawn


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1))
def test_everything_comes_once_one_by_one_as_all_at_once(size: int, seed: int) -> None:
    permutation = Permutation(size, seed)
    found = permutation(np.arange(size))
    assert sorted(found.tolist()) == list(range(size))
    for place in (0, size // 2, size - 1):
        assert permutation.at(place) == found[place]


def test_orders_of_few_are_equally_likely() -> None:
    counts = Counter(tuple(Permutation(3, seed)(np.arange(3)).tolist()) for seed in range(3000))
    assert len(counts) == 6
    assert min(counts.values()) > 400, counts  # 500 each, four deviations of 20


def test_places_and_what_stands_there_are_not_correlated() -> None:
    found = Permutation(10_000, 1)(np.arange(10_000))
    assert abs(np.corrcoef(np.arange(10_000), found)[0, 1]) < 0.04
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.04
    assert (Permutation(10_000, 1, 0)(np.arange(10_000)) == found).sum() < 10


def test_a_size_that_no_table_could_have() -> None:
    permutation = Permutation(10**15 + 7, 3)
    places = [permutation.at(place) for place in (0, 1, 10**15)]
    assert len(set(places)) == 3
    assert all(0 <= place < 10**15 + 7 for place in places)
    assert permutation(np.array([0, 1, 10**15])).tolist() == places


def test_what_is_drawn_is_the_same_in_every_process() -> None:
    code = (
        "from helixpipe.train.order import *; import numpy as np;"
        "print(drawn(1, 2, 3), Permutation(100, 5, 6)(np.arange(9)).tolist())"
    )
    assert printed(code) == {f"{drawn(1, 2, 3)} {Permutation(100, 5, 6)(np.arange(9)).tolist()}\n"}
    assert len({drawn(*words) for words in ((0,), (0, 0), (1,), (0, 1), (1, 0), ())}) == 6


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 2**63 - 1), st.integers(1, 2000))
def test_every_source_has_its_share_at_any_time(weights: list[float], seed: int, count: int) -> None:
    found = Mixture(weights, seed).before(count)
    assert sum(found) == count
    for number, weight in zip(found, weights, strict=True):
        assert abs(number - count * weight / sum(weights)) < len(weights)


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (0.2, 0.5, 0.1, 0.2), (1e-9, 1.0)])
def test_each_sequence_is_the_next_one_of_one_source(weights: tuple[float, ...]) -> None:
    mixture, counts = Mixture(weights, 7), [0] * len(weights)
    for sequence in range(500):
        assert mixture.before(sequence) == counts
        source, before = mixture.source(sequence)
        assert before == counts[source]
        counts[source] += 1


def test_the_seed_decides_which_source_begins() -> None:
    assert {Mixture((1.0, 1.0), seed).source(0)[0] for seed in range(20)} == {0, 1}
