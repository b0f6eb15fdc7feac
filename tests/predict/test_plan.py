"""The search: everything priced, what fits ranked, and what is no pipeline beside it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from helixpipe.errors import ConfigError
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Keeping
from helixpipe.predict.alternatives import alternatives
from helixpipe.predict.candidates import Candidate, candidates
from helixpipe.predict.choices import Made, estimate_candidate
from helixpipe.predict.estimate import Setting
from helixpipe.predict.hardware import Link, named_accelerator, named_link
from helixpipe.predict.plan import Plan, plan
from helixpipe.schedule.families import FAMILIES
from helixpipe.view.front import picture

SHAPE = ModelShape(layers=8, hidden=512, heads=4, ffn=2048, vocabulary=512)
SETTING = Setting(SHAPE, 8192, named_accelerator("h100"), named_link("infiniband"), Keeping("none", 2))


@pytest.fixture(scope="module")
def found() -> Plan:
    """Of a few families, one of each kind."""
    return plan(SETTING, 4, 8, 2.0**30, only=("1f1b", "zb_v", "helix", "seq1f1b"))


def test_every_family_is_tried_with_every_policy() -> None:
    asked = candidates(4, 8, 8192, 128)
    assert {candidate.family for candidate in asked} == set(FAMILIES) - {
        "constructed"
    }  # tried beside the fastest of them
    assert len(asked) == len(set(asked))
    of_helix = [candidate for candidate in asked if candidate.family == "helix"]
    assert len(of_helix) == 2 * 3 * 2 * 3 * 2  # folds, travel, groups; recompute, chunks
    assert {candidate.recompute for candidate in asked} == {"none", "selective", "full"}
    assert not [c for c in candidates(4, 8, 8192, 128, causal=False) if dict(c.options).get("segments", 1) > 1]
    assert len(candidates(8, 32, 131072, 128)) > 490


def test_chunks_that_no_segment_is_longer_than_are_no_candidate() -> None:
    """8192 tokens: chunks of 4096 are for whole sequences, and for two segments of unequal length."""
    found = plan(SETTING, 2, 2, math.inf, only=("seq1f1b", "1f1b"))
    chunked = {str(each) for each in found.fits if each.is_pipeline and each.candidate.chunk}
    assert {name.split(", recompute")[0] for name in chunked} == {
        "1f1b", "seq1f1b, segments 2", "seq1f1b, segments 2, evenness 0.5",
    }  # fmt: skip
    short = plan(replace(SETTING, sequence_length=4096), 4, 8, math.inf, only=("1f1b",))
    assert {each.candidate.chunk for each in short.fits} == {0}


def test_what_fits_is_ranked_and_every_rank_is_told(found: Plan) -> None:
    times = [choice.makespan_s for choice in found.fits]
    assert times == sorted(times)
    assert all(choice.peak_bytes <= 2.0**30 for choice in found.fits)
    assert found.misses
    assert all(choice.peak_bytes > 2.0**30 for choice in found.misses)
    for choice in (*found.fits, *found.misses):
        assert len(choice.ranks) == 4
        assert choice.peak_bytes == max(rank.peak_bytes for rank in choice.ranks)
        for rank in choice.ranks:
            ended = rank.busy_s + rank.idle_s
            if choice.candidate.family == "helix":  # weight gradients may come home after the last action
                assert ended <= choice.makespan_s * (1 + 1e-6)
            else:
                assert ended == pytest.approx(choice.makespan_s)


def test_a_choice_is_what_its_estimate_says(found: Plan) -> None:
    for choice in (found.best, found.fits[len(found.fits) // 2], found.misses[0]):
        if choice.is_pipeline:
            again = estimate_candidate(SETTING, 4, 8, choice.candidate)
            assert again.step_s == choice.makespan_s
            assert tuple(rank.peak_bytes for rank in choice.ranks) == again.timeline.peak_bytes
            assert again.ideal_s == choice.ideal_s


@pytest.mark.parametrize("family", ["1f1b", "constructed"])
def test_policies_share_no_order_that_is_built_from_costs(family: str) -> None:
    """What is recomputed is part of what actions cost, and training builds its order by that."""
    made = Made()
    for recompute in ("none", "full"):
        candidate = Candidate(family, (("vocabulary", "spread"),), recompute=recompute)
        apart = estimate_candidate(SETTING, 4, 8, candidate)
        assert estimate_candidate(SETTING, 4, 8, candidate, made).timeline == apart.timeline
    assert len(made.schedules) == 2


def test_what_fits_only_with_the_vocabulary_on_all_ranks_is_found() -> None:
    """A whole head left no room on one rank, and nothing else was tried."""
    setting = replace(SETTING, shape=replace(SHAPE, vocabulary=65536), sequence_length=2048)
    found = plan(setting, 4, 4, 0.75 * 2.0**30, only=("1f1b",))
    assert dict(found.best.candidate.options) == {"vocabulary": "spread"}
    pipelines = [choice.candidate for choice in (*found.fits, *found.misses) if choice.is_pipeline]
    assert len(set(pipelines)) == len(pipelines) > 3


@pytest.mark.parametrize("memory_bytes", [math.inf, 0.3 * 2.0**30])
def test_the_fastest_alone_are_those_of_all(memory_bytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixpipe.predict.plan.PRICED_AT_ONCE", 4)
    only = ("1f1b", "zb_v", "helix", "seq1f1b")
    whole = plan(SETTING, 4, 8, memory_bytes, only)
    fast = plan(SETTING, 4, 8, memory_bytes, only, top=3)
    pipelines = [choice for choice in whole.fits if choice.is_pipeline]
    found = [choice for choice in fast.fits if choice.is_pipeline]
    assert fast.best == whole.best
    assert len(found) == 3
    assert set(map(str, found)) <= set(map(str, pipelines))
    # with the vocabulary on all ranks those alone that could be the fastest
    named = [choice for choice in pipelines[:3] if "vocabulary" not in dict(choice.candidate.options)]
    assert set(map(str, named)) <= set(map(str, found))
    others = [[choice for choice in each.fits if not choice.is_pipeline] for each in (whole, fast)]
    assert others[0] == others[1]
    assert fast.slower > len(pipelines) - 12


def test_the_fastest_alone_of_nothing_that_fits_name_the_nearest_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixpipe.predict.plan.PRICED_AT_ONCE", 1)
    only = ("1f1b", "gpipe")
    whole, fast = plan(SETTING, 2, 4, 1e6, only), plan(SETTING, 2, 4, 1e6, only, top=3)
    assert fast.nothing == whole.nothing
    assert fast.slower > 0


def test_nothing_beats_the_front_in_both(found: Plan) -> None:
    front = found.front
    assert front[0] is found.best
    for choice in found.fits:
        if choice.is_pipeline and choice not in front:
            assert any(c.makespan_s <= choice.makespan_s and c.peak_bytes <= choice.peak_bytes for c in front)
    for a, b in itertools.pairwise(front):
        assert a.makespan_s <= b.makespan_s
        assert a.peak_bytes > b.peak_bytes


def test_processes_find_the_same() -> None:
    options = {"memory_bytes": math.inf, "only": ("1f1b", "helix")}
    done: list[tuple[int, int]] = []
    alone = plan(SETTING, 2, 4, **options, progress=lambda n, of: done.append((n, of)))
    assert plan(SETTING, 2, 4, **options, processes=2) == alone
    of = done[0][1]
    assert done[:of] == [(i, of) for i in range(1, of + 1)]
    assert done[-1][0] == done[-1][1]  # what is tried beside them is counted by itself


def test_when_nothing_fits_the_nearest_miss_is_named() -> None:
    found = plan(SETTING, 2, 4, 1e6, only=("1f1b", "gpipe"))
    nearest = next(choice for choice in found.misses if choice.is_pipeline)
    with pytest.raises(ConfigError) as caught:
        _ = found.best
    assert str(caught.value) == (
        f"memory: no schedule fits 0.0 GiB; the nearest is {nearest} with {nearest.peak_bytes / 2**30:.1f} GiB on rank "
        f"{nearest.fullest}: give that much memory, more ranks, or more tensor_parallel"
    )
    assert nearest.peak_bytes == min(choice.peak_bytes for choice in found.misses if choice.is_pipeline)


def test_when_nothing_can_be_made_the_reason_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^no schedule can be made for this: schedule.ranks: 8 layers cannot"):
        _ = plan(SETTING, 16, 4, math.inf, only=("1f1b",)).best


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^schedule.family: 'helx' is not known; did you mean 'helix'\?$"):
        plan(SETTING, 2, 4, math.inf, only=("helx",))


def test_sharded_data_parallel_is_compute_or_messages_whichever_is_longer() -> None:
    """8 sequences on 4 ranks: two turns. Weights: two gathers in bfloat16, one float32 scatter, of 3/4 of the model."""
    free = replace(SETTING, link=named_link("free"))
    sharded = alternatives(free, 4, 8)[0]
    assert sharded.name == "fsdp"
    assert sharded.makespan_s == pytest.approx(2 * free.microbatch_s) == pytest.approx(sharded.busy_s)
    slow = replace(SETTING, link=Link("slow", 1e6, 0.0, "made up"))
    taken = alternatives(slow, 4, 8)[0]
    assert taken.makespan_s == pytest.approx(2 * SHAPE.parameter_count * 0.75 * (2 + 2 + 4) / 1e6)
    uneven = alternatives(free, 4, 9)[0]
    assert uneven.makespan_s == pytest.approx(3 * free.microbatch_s)  # one rank has a third


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_alternatives_pay_for_chunks(recompute: str) -> None:
    """One more forward of MLP and head; a recompute ends in them and leaves theirs out, so there it costs no more."""
    free = replace(SETTING, link=named_link("free"))
    whole, sliced = (
        alternatives(replace(free, keeping=Keeping(recompute, 2, chunk, chunk)), 4, 4) for chunk in (0, 4096)
    )
    mlp, head = (free.costs.forward_s(Part(kind, 0), free.whole, 0) for kind in ("mlp", "head"))
    more = SHAPE.layers * mlp + head if recompute == "none" else 0.0
    for plain, chunked in zip(whole, sliced, strict=True):
        assert chunked.makespan_s == pytest.approx(plain.makespan_s + more)
        assert chunked.peak_bytes < plain.peak_bytes


def test_context_parallel_hides_its_ring_or_waits_for_it() -> None:
    free = replace(SETTING, link=named_link("free"))
    context = alternatives(free, 4, 8)[1]
    assert context.name == "context_parallel"
    assert context.makespan_s == pytest.approx(8 * free.microbatch_s / 4)
    slow = replace(SETTING, link=Link("slow", 1e6, 0.0, "made up"))
    elements = 2 * 8192 * SHAPE.kv_size * 0.75
    taken = alternatives(slow, 4, 8)[1]
    assert taken.makespan_s > 8 * SHAPE.layers * elements * (2 + 2 + 4) / 1e6
    again = replace(slow, keeping=replace(slow.keeping, recompute="full"))  # attention, and so its ring, runs twice
    assert alternatives(again, 4, 8)[1].makespan_s > 8 * SHAPE.layers * elements * (2 + 2 + 2 + 4) / 1e6
    assert context.peak_activation_bytes < alternatives(free, 4, 8)[0].peak_activation_bytes / 3
    assert [each.name for each in alternatives(replace(free, sequence_length=8191), 4, 8)] == ["fsdp"]
    assert alternatives(free, 1, 8) == ()


def test_long_sequences_on_a_fast_network_are_best_without_a_pipeline() -> None:
    setting = Setting(SHAPES["7b"], 131072, named_accelerator("h20"), named_link("nvlink"), Keeping("none", 2))
    found = plan(setting, 4, 4, math.inf, only=("1f1b",))
    assert found.fits[0].candidate.family == "context_parallel"
    assert not found.fits[0].is_pipeline
    assert found.best.candidate.family == "1f1b"


def test_the_picture_shows_every_choice_and_the_limit(found: Plan) -> None:
    drawing = picture(found, "a <title> & more")
    assert "a &lt;title&gt; &amp; more" in drawing
    assert "does not fit" in drawing
    assert str(found.best) in drawing
    assert drawing.count("<title>") > 50
    assert picture(found, "a <title> & more") == drawing


def test_a_candidate_is_told_in_words() -> None:
    candidate = Candidate("helix", (("folds", 2), ("travel", "qkv")), 0.5, "full", 4096)
    assert str(candidate) == "helix, folds 2, travel qkv, evenness 0.5, recompute full, chunks of 4096"
