"""The two published comparisons, reduced: the orderings that the papers report and the predictions reproduce."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
K = 1024


def script(path: str, *remembered: str) -> dict[str, Any]:
    """A benchmark's names; what functions of these names found they do not find a second time."""
    found = runpy.run_path(str(BENCHMARKS / path))
    for name in remembered:
        found[name] = found[name].__globals__[name] = remembering(found[name])
    return found


def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    def found(*given: Any) -> Any:
        key = repr(given)
        if key not in known:
            known[key] = function(*given)
        return known[key]

    return found


@pytest.fixture(scope="module")
def helix() -> dict[str, Any]:
    return script("paper_helixpipe/run.py", "priced")


@pytest.fixture(scope="module")
def seq() -> dict[str, Any]:
    return script("paper_seq1f1b/run.py", "row", "memory")


@pytest.fixture(scope="module")
def seq_memory(seq: dict[str, Any]) -> list[dict[str, Any]]:
    """Each of the authors' models at each of their lengths."""
    return seq["all_memory"]()  # type: ignore[no-any-return]


def seq_runs(rows: list[dict[str, Any]]) -> dict[tuple[str, int, str], dict[str, Any]]:
    return {(row["model"], row["tokens"] // K, name): each for row in rows for name, each in row["methods"].items()}


def test_helix_is_fastest_at_its_headline(helix: dict[str, Any]) -> None:
    """7B, 128k tokens, 64 H20: faster than 1F1B, ZB1P and AdaPipe, whatever travels, in less memory.

    The rank with the head has its logits and their gradients in float32, whole, and holds up to 1.4 times as much.
    """
    found = helix["cell"](*helix["HEADLINE"])
    by = found["contenders"]
    for name in (*helix["HELIX"], *helix["WHOLE"]):
        assert by[name]["fits"]
        for other in helix["OTHERS"]:
            assert by[name]["step_s"] < by[other]["step_s"]
        assert by[name]["peak_bytes"] < by["1F1B"]["peak_bytes"] < by["ZB1P"]["peak_bytes"]
        # as much on all other ranks, where 1F1B's first keeps p micro-batches and its last one
        assert by[name]["least_bytes"] > 0.95 * by[name]["next_bytes"]
        assert 1.15 * by[name]["next_bytes"] < by[name]["peak_bytes"] < 1.4 * by[name]["next_bytes"]
    assert by["1F1B"]["least_bytes"] < 0.3 * by["1F1B"]["peak_bytes"]
    assert by["ZB1P"]["step_s"] < by["1F1B"]["step_s"]


def test_a_chunked_mlp_costs_time_where_its_output_is_read(helix: dict[str, Any]) -> None:
    """Where the attention block travels the MLP ends its stage: no forward of it runs a third time."""
    by = helix["cell"]("1.3b", 32 * K, 2)["contenders"]
    step_s = {name: each["step_s"] for name, each in by.items()}
    assert step_s["helix, attention travels"] == pytest.approx(step_s["helix, attention travels, MLP whole"], rel=1e-9)
    for travel in ("none", "qkv"):
        assert step_s[f"helix, {travel} travels"] > 1.02 * step_s[f"helix, {travel} travels, MLP whole"]


def test_recompute_saves_1f1b_more_memory_than_helix(helix: dict[str, Any]) -> None:
    """And costs it more time: at the headline, what is kept is 2p micro-batches of each layer in HelixPipe."""
    ways = helix["WHOLE"][helix["PAPERS"]][0], helix["Way"]("1f1b", "selective")
    ours, again = (helix["priced"](way, *helix["HEADLINE"], helix["VARIED"][0]) for way in ways)
    assert again["peak_bytes"] < 0.5 * ours["peak_bytes"]
    assert again["step_s"] > 1.2 * ours["step_s"]


def test_helix_gains_with_the_length(helix: dict[str, Any]) -> None:
    cells = [helix["cell"]("1.3b", length, 2) for length in (32 * K, 64 * K, 128 * K)]
    for key in ("papers_ratio", "ratio", "whole_ratio"):
        ratios = [each[key] for each in cells]
        assert ratios == sorted(ratios)
        assert ratios[-1] > 1.1


def test_helix_fits_where_the_others_must_recompute(helix: dict[str, Any]) -> None:
    def step(way: Any) -> dict[str, Any]:
        return helix["priced"](way, "13b", 128 * K, 4, helix["Assumptions"]())  # type: ignore[no-any-return]

    assert not any(step(way)["fits"] for name in ("1F1B", "ZB1P") for way in helix["OTHERS"][name])
    again = [step(way) for way in helix["OTHERS"]["AdaPipe-like"][1:]]
    ours = step(helix["WHOLE"][helix["PAPERS"]][0])
    assert all(each["fits"] for each in (*again, ours))
    assert ours["step_s"] < min(each["step_s"] for each in again)


def test_waiting_for_messages_costs_time(helix: dict[str, Any]) -> None:
    """A little, where the links are fast."""
    overlapped, waited = (
        helix["priced"](helix["WHOLE"][helix["PAPERS"]][0], "3b", 32 * K, 4, helix["Assumptions"](blocking=blocking))
        for blocking in (False, True)
    )
    assert overlapped["step_s"] < waited["step_s"] < 1.2 * overlapped["step_s"]


@pytest.mark.parametrize("length", [32 * K, 64 * K])
def test_seq1f1b_is_faster_in_less_memory(seq: dict[str, Any], length: int) -> None:
    """7B on 32 A100, m = 8: Seq1F1B over 1F1B-I over 1F1B in tokens/s, and the other way round in memory."""
    methods = seq["row"](length, 8)["methods"]
    speed = {name: each["tokens_per_s"] for name, each in methods.items()}
    memory = {name: max(each["peak_bytes"]) for name, each in methods.items()}
    assert speed["1F1B"] < speed["1F1B-I"] < speed["Seq1F1B"]
    assert memory["Seq1F1B-I"] < memory["Seq1F1B"] < memory["1F1B"] < memory["1F1B-I"]
    published = methods["1F1B"]["published_tokens_per_s"]
    assert published
    assert speed["1F1B"] == pytest.approx(published, rel=0.1)


def test_seq1f1b_gains_less_from_more_microbatches(seq: dict[str, Any]) -> None:
    few, many = (seq["row"](32 * K, m)["methods"] for m in (8, 16))
    assert 1 < many["Seq1F1B"]["ratio"] < few["Seq1F1B"]["ratio"]
    # what twice the micro-batches bring 1F1B tells p: (1 + 3/8) / (1 + 3/16) for 4 ranks, 1.28 for 8
    gain = {key: many["1F1B"][key] / few["1F1B"][key] for key in ("tokens_per_s", "published_tokens_per_s")}
    assert gain["tokens_per_s"] == pytest.approx(gain["published_tokens_per_s"], rel=0.02)


def test_starting_a_part_costs_short_segments_most(seq: dict[str, Any]) -> None:
    free, slow = (
        {name: each["ratio"] for name, each in seq["row"](32 * K, 8, given)["methods"].items()}
        for given in (seq["Assumptions"](accelerator={"launch_s": launch_s}) for launch_s in (0.0, 200e-6))
    )
    assert slow["Seq1F1B"] < 0.95 * free["Seq1F1B"]
    assert slow["1F1B-I"] == pytest.approx(free["1F1B-I"], rel=0.01)


def test_seq1f1b_fits_128k_tokens(seq: dict[str, Any]) -> None:
    methods = seq["row"](128 * K, 8)["methods"]
    assert not methods["1F1B-I"]["fits"]
    assert methods["Seq1F1B"]["fits"]
    assert methods["Seq1F1B-I"]["fits"]


def test_seq1f1b_fullest_rank_is_predicted_low(seq_memory: list[dict[str, Any]]) -> None:
    """What a run holds is part of what its allocator reserved, so none is predicted above it. How far below is not derived
    but seen, and it is far: up to three tenths without segments, and two fifths with them (7B at 128k)."""
    least = {"1F1B": 0.70, "1F1B-I": 0.76, "Seq1F1B": 0.57, "Seq1F1B-I": 0.62}
    ran = {at: each for at, each in seq_runs(seq_memory).items() if each["published_fullest_gib"]}
    assert len(ran) == 37
    for (model, length, name), each in ran.items():
        assert least[name] < each["fullest_share"] < 1, (model, length, name)


def test_seq1f1b_ratios_to_1f1b_fullest_to_fullest(seq_memory: list[dict[str, Any]]) -> None:
    """Seq1F1B's is predicted up to 0.11 below what was measured. 13B at 64k is apart: 1F1B ran short of room there."""
    found = {
        (row["model"], row["tokens"] // K): each["published_over_1f1b"] - each["over_1f1b"]
        for row in seq_memory
        if (each := row["methods"]["Seq1F1B"])["published_over_1f1b"]
    }
    assert len(found) == 8
    assert 0.15 < found.pop(("13B", 64)) < 0.2
    assert all(0.04 < gap < 0.11 for gap in found.values())


def test_seq1f1b_ranks_are_as_uneven_as_measured(seq_memory: list[dict[str, Any]]) -> None:
    """The charts without titles over the one with: predicted for the mean over the fullest. 13B at 64k is apart again.

    The others come out too even by up to 0.055: the head's rank needs float32 gradients of logits that Megatron's does not.
    """
    ran = {at: each for at, each in seq_runs(seq_memory).items() if each["published_fullest_gib"]}
    off = {at: each["evenness"] - each["published_evenness"] for at, each in ran.items()}
    assert -0.07 < off.pop(("13B", 64, "1F1B")) < -0.06
    assert all(-0.02 < each < 0.06 for each in off.values())


def test_seq1f1b_charts_without_titles_are_means(seq: dict[str, Any]) -> None:
    """Each bar is a mean over all ranks of two runs, and not of one rank, or of half of them."""
    for each in seq["grain"](seq["MODELS"].values()):
        assert each["one_rank"] == each["all_ranks"] == each["bars"]
        assert each["untitled_one_rank"] < each["half_the_ranks"] < each["bars"]
    assert [seq["MODELS"][name].ranks for name in ("2.7B", "7B", "13B", "30B")] == [8, 4, 4, 8]


def test_seq1f1b_runs_that_ran_out_of_memory(seq_memory: list[dict[str, Any]]) -> None:
    """All that ran are predicted to fit; of the 11 that did not, one is predicted to."""
    runs = seq_runs(seq_memory)
    failed = {at for at, each in runs.items() if each["published_fullest_gib"] is None}
    assert len(failed) == 11
    unfit = {at for at, each in runs.items() if not each["fits"]}
    assert unfit <= failed
    assert failed - unfit <= {("7B", 128, "1F1B")}


def test_keys_kept_twice(seq: dict[str, Any]) -> None:
    """The first rank of Seq1F1B has p-1+k segments under way: a whole sequence, and all but the last of another."""
    model, length = seq["MODELS"]["7B"], 64 * K
    plain, copied = (seq["memory"](model, length, seq["Assumptions"](copied=way))["methods"] for way in (False, True))
    more = {
        name: [(b - a) * 2**30 for a, b in zip(plain[name]["ranks_gib"], copied[name]["ranks_gib"], strict=True)]
        for name in plain
    }
    assert more["1F1B"] == more["1F1B-I"] == [0, 0, 0, 0]
    *most, last = seq["Assumptions"]().setting(length).segment_lengths(4)
    tokens = 2 * sum(most) + last
    elements = 2 * tokens * model.hidden * model.layers // model.ranks // model.tensor_parallel
    assert more["Seq1F1B"][0] == pytest.approx(2 * elements)
    assert more["Seq1F1B"] == sorted(more["Seq1F1B"], reverse=True)
    assert more["Seq1F1B-I"][0] > 0


def test_seq1f1b_page_is_written_between_marks(seq: dict[str, Any]) -> None:
    page = "before\n<!-- speed -->\nold\n<!-- end of speed -->\nafter\n"
    put = seq["written"](page, {"speed": "| new |"})
    assert put == "before\n<!-- speed -->\n\n| new |\n\n<!-- end of speed -->\nafter\n"
    assert seq["written"](put, {"speed": "| new |"}) == put
    with pytest.raises(
        ValueError, match=re.escape("no '<!-- memory -->' before an '<!-- end of memory -->'; put both")
    ):
        seq["written"](page, {"memory": ""})


def test_tables(helix: dict[str, Any], seq: dict[str, Any], seq_memory: list[dict[str, Any]]) -> None:
    at = "1.3b", 32 * K, 2
    result = {
        "cells": [helix["cell"](*at)],
        "composition": helix["composition"](at),
        "varied": helix["vary"](helix["VARIED"][:2], at),
    }
    lines = helix["tables"](result).splitlines()
    assert any(line.startswith("| 1.3b | 2 | 32k | ZB1P (recompute none) | ") for line in lines)
    assert any(line.startswith("| messages take no time | ZB1P (recompute none) | ") for line in lines)
    result = {
        "rows": [seq["row"](128 * K, 8)],
        "varied": seq["vary"](seq["VARIED"][:1]),
        "memory": seq_memory,
        "varied_memory": [seq["memory"](seq["MODELS"]["7B"], 64 * K)],
    }
    found = seq["tables"](result)
    assert seq["written"](seq["PAGE"].read_text(), found)  # the page has all the marks
    lines = [line for table in found.values() for line in table.splitlines()]
    assert any(line.startswith("| 128k | 8 | Seq1F1B | ") and " | 30392 | " in line for line in lines)
    assert any(
        line.startswith("| 128k | 8 | 1F1B-I | ") and ", out of memory | out of memory | - | " in line for line in lines
    )
    assert any(line.startswith("| published | 1.099 | 1.110 | 0.980 | ") for line in lines)
    assert any(
        line.startswith("| 2.7B | 24k | 1F1B-I | ") and ", does not fit | out of memory | - | " in line
        for line in lines
    )
    assert any(
        line.startswith("| 13B | 64k | Seq1F1B | ") and " | 51.60 | " in line and " | 43.27 | " in line
        for line in lines
    )
    assert any(line.startswith("| 7B | 64k | measured | 1.22 | 0.67 | 0.55 | 0.69 | ") for line in lines)
    assert any(line.startswith("| 30B | 8 | 7 | 7 | ") for line in lines)
    assert any(line.startswith("- Out of memory on 80 GB: of 11 runs that failed, ") for line in lines)
