"""The section [data]: several sources as they are written, and what cannot be is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helixpipe.config_data import DataConfig, SourceConfig
from helixpipe.config_text import build_config, parse_arguments, read_toml, to_table, write_toml
from helixpipe.errors import ConfigError


def test_sources_are_written_as_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[data]\npath = ["x", {path = "y", weight = 3}]\n')
    sources = (SourceConfig("x", 1.0), SourceConfig("y", 3.0))
    built = build_config(read_toml(file))
    assert built.data.path == built.data.sources == sources
    file.write_text(write_toml(built))
    assert build_config(read_toml(file)) == build_config(to_table(built)) == built
    assert DataConfig("z").sources == (SourceConfig("z", 1.0),)
    for text, wanted in {
        "x,y:3": [{"path": "x", "weight": 1.0}, {"path": "y", "weight": 3.0}],
        "a:b,c:0.5": [{"path": "a:b", "weight": 1.0}, {"path": "c", "weight": 0.5}],
        "x:3": "x:3",
    }.items():
        assert parse_arguments(["--data.path", text]).overrides["data"]["path"] == wanted


LIST = 'give a path, or a list of paths or of tables {path = "...", weight = 2}'


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([{"path": "x", "weight": -1}], "source 1, 'x', has weight -1; give a number above 0, or leave the source out"),
        ([{"path": "x", "weight": 0}], "source 1, 'x', has weight 0; give a number above 0, or leave the source out"),
        (["x", {"path": "y", "weight": float("nan")}], "source 2, 'y', has weight nan; give a number above 0, or leave the source out"),
        ([{"path": "x", "weight": float("inf")}], "source 1, 'x', has weight inf; give a number above 0, or leave the source out"),
        ([{"path": "x", "weight": True}], "source 1, 'x', has weight True; give a number above 0, or leave the source out"),
        (["x", {"weight": 2}], 'source 2 has no path; write {path = "...", weight = ...}'),
        (["x", ""], 'source 2 has no path; write {path = "...", weight = ...}'),
        ([{"path": "x", "wieght": 2}], "source 1: wieght: no such key; did you mean 'weight'?"),
        (["x", 3], f"source 2 is 3; {LIST}"),
    ],
)  # fmt: skip
def test_a_list_of_sources_that_cannot_be_is_one_line(path: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"data": {"path": path}})
    assert str(caught.value) == f"data.path: {message}"


@pytest.mark.parametrize("path", [[], 3, True])
def test_what_is_no_source_is_one_line(path: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"data": {"path": path}})
    assert str(caught.value) == f"data.path: {path!r} will not do; {LIST}"


def test_a_weight_on_the_command_line_is_refused_there() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--data.path", "x:0,y"])
    assert str(caught.value) == (
        "--data.path: source 1, 'x', has weight 0.0; give a number above 0, or leave the source out"
    )
    with pytest.raises(ConfigError, match=r"^--data.path: source 2 has no path; "):
        parse_arguments(["--data.path", "x,"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"packing": "balanced", "document_mask": False},
            "data.document_mask: false, and then all sequences cost the same and nothing is to be balanced; "
            "set data.packing to documents or leave the mask",
        ),
        ({"packing": "balanced", "look_ahead": 0}, "data.look_ahead: 0; give at least 1"),
        ({"packing": "packed"}, "data.packing: 'packed' is not known; did you mean 'balanced'?"),
        ({"packing": "documents", "length": 1}, "train.sequence_length: 1, and data.packing documents needs at least 2; raise it"),
        ({"packing": "balanced", "length": 1}, "train.sequence_length: 1, and data.packing balanced needs at least 2; raise it"),
    ],
)  # fmt: skip
def test_packing_that_cannot_be_is_one_line(given: dict[str, Any], message: str) -> None:
    length = given.get("length", 24)
    with pytest.raises(ConfigError) as caught:
        build_config(
            {
                "data": {"path": "x"} | {key: value for key, value in given.items() if key != "length"},
                "train": {"sequence_length": length},
            }
        )
    assert str(caught.value) == message
