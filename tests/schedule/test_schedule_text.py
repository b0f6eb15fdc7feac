"""Schedules in files: what is written reads back equal, and what cannot be read says where and why."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.errors import HelixpipeError, ScheduleError
from helixpipe.parts.kind import KINDS
from helixpipe.parts.part import Part
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage
from helixpipe.schedule.text import from_csv, from_json, load, save, to_csv, to_json
from helixpipe.schedule.torch_text import to_torch_csv

numbers = st.integers(0, 10**9 - 1)
actions = st.builds(Action, numbers, st.sampled_from(Pass), numbers, numbers)
shards = st.integers(2, 999).flatmap(lambda count: st.tuples(st.integers(0, count - 1), st.just(count)))


def _part(kind: str, layer: int, shard: tuple[int, int]) -> Part:
    which = shard if KINDS[kind].sharded else (0, shard[1]) if KINDS[kind].joins else (0, 1)
    return Part(kind, 0 if kind == "embed" else layer, *which)


parts = st.builds(_part, st.sampled_from(list(KINDS)), numbers, shards | st.just((0, 1)))
stages = st.builds(Stage, st.lists(parts, max_size=5).map(tuple), st.none() | numbers)
schedules = st.builds(  # any at all, also such as check refuses
    Schedule,
    st.lists(stages, min_size=1, max_size=5).map(tuple),
    st.lists(st.lists(actions, max_size=8).map(tuple), max_size=5).map(tuple),
)


@settings(max_examples=200, deadline=None)
@given(schedules)
def test_round_trips_are_exact(schedule: Schedule) -> None:
    assert from_json(to_json(schedule)) == schedule
    assert from_csv(to_csv(schedule)) == schedule
    assert to_json(from_csv(to_csv(schedule))) == to_json(schedule)


@given(actions)
def test_an_action_is_its_text(action: Action) -> None:
    assert Action.parse(str(action)) == action


def test_the_notation_is_torchs_with_segments() -> None:
    assert str(Action(3, Pass.F, 1)) == "3F1"
    assert str(Action(3, Pass.I, 1, 2)) == "3I1.2"
    assert Action.parse("12W10") == Action(12, Pass.W, 10)


def test_what_the_files_look_like() -> None:
    schedule = build_schedule("helix", ranks=2, layers=1, microbatches=1, travel="qkv")
    assert to_csv(schedule) == (
        "# stage 0: embed norm.0\n"
        "# stage 1 home 0: qkv.0 attn.0\n"
        "# stage 2: proj.0 mlp.0 head.1\n"
        "0F0,0B0\n"
        "1F0,2F0,2B0,1B0\n"
    )
    assert to_json(schedule) == (
        '{"stages": [\n'
        '{"parts": "embed norm.0", "home": null},\n'
        '{"parts": "qkv.0 attn.0", "home": 0},\n'
        '{"parts": "proj.0 mlp.0 head.1", "home": null}\n'
        '], "ranks": [\n'
        '["0F0", "0B0"],\n'
        '["1F0", "2F0", "2B0", "1B0"]\n'
        "]}\n"
    )


def test_csv_from_other_hands() -> None:
    """Windows line ends, blank lines, spaces, quotes, and torch's empty cells for standing idle."""
    ours = "# stage 0: embed block.0 head.1\n0F0,0B0\n"
    theirs = '\r\n#  stage 0 :  embed   block.0 head.1\r\n\r\n "0F0" ,,0B0, \r\n\r\n'
    assert from_csv(theirs) == from_csv(ours)


def test_a_rank_without_actions_stays_a_rank() -> None:
    schedule = Schedule(build_schedule("gpipe", ranks=1, layers=1, microbatches=1).stages, ((), (), ()))
    assert from_csv(to_csv(schedule)).ranks == from_json(to_json(schedule)).ranks == ((), (), ())


STAGE = '{"parts": "embed block.0 head.1", "home": null}'
BAD_JSON = {
    "{": "line 1, column 2: not JSON: Expecting property name enclosed in double quotes",
    '{"stages": [],\n "ranks": [}': "line 2, column 12: not JSON: Expecting value",
    f'{{"stages": [{STAGE}], "ranks": []}} x': "line 1, column 76: not JSON: Extra data",
    "[]": "the file: not an object; write {ranks, stages}",
    "{}": "the file: the key 'stages' is missing",
    '{"stages": []}': "the file: the key 'ranks' is missing",
    '{"stages": [], "ranks": []}': "stages: no stages; name each stage's parts",
    '{"stages": [], "rank": []}': "the file: unknown key 'rank'; did you mean 'ranks'?",
    '{"stages": [], "stages": []}': "the key 'stages' is there twice; remove one",
    '{"stages": {}, "ranks": []}': "stages: not a list",
    '{"stages": ["embed"], "ranks": []}': "stages[0]: not an object; write {home, parts}",
    '{"stages": [{"parts": ""}], "ranks": []}': "stages[0]: the key 'home' is missing",
    '{"stages": [{"parts": "", "home": null, "house": 1}], "ranks": []}': (
        "stages[0]: unknown key 'house'; did you mean 'home'?"
    ),
    '{"stages": [{"parts": [], "home": null}], "ranks": []}': (
        "stages[0].parts: not a text of parts such as 'proj.0 mlp.0'"
    ),
    '{"stages": [{"parts": "embed norms.0", "home": null}], "ranks": []}': (
        "stages[0].parts: 'norms.0' is not a part; write one as 'embed', 'norm.3' or 'head.32'"
    ),
    '{"stages": [{"parts": "", "home": true}], "ranks": []}': (
        "stages[0].home: true is not a rank; give a rank's number or null"
    ),
    '{"stages": [{"parts": "", "home": -1}], "ranks": []}': (
        "stages[0].home: -1 is not a rank; give a rank's number or null"
    ),
    f'{{"stages": [{STAGE}], "ranks": 3}}': "ranks: not a list",
    f'{{"stages": [{STAGE}], "ranks": [[], "0F0"]}}': "ranks[1]: not a list",
    f'{{"stages": [{STAGE}], "ranks": [["0F0", 5]]}}': 'ranks[0][1]: 5 is not an action; write one as "3F1"',
    f'{{"stages": [{STAGE}], "ranks": [["0F0", "0X0"]]}}': (
        "ranks[0][1]: '0X0' has the unknown pass 'X'; known: F, B, I, W, R"
    ),
    f'{{"stages": [{STAGE}], "ranks": [["0F0 "]]}}': (
        "ranks[0][0]: '0F0 ' is not an action; write one as '3F1', or '3F1.2' for its segment 2"
    ),
}


@pytest.mark.parametrize("text", BAD_JSON)
def test_bad_json_says_where_and_why(text: str) -> None:
    with pytest.raises(ScheduleError) as error:
        from_json(text)
    assert str(error.value) == BAD_JSON[text]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"stages": ' + "9" * 5000 + "}"])
def test_json_that_is_only_meant_badly(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"^not JSON: "):
        from_json(text)


BAD_CSV = {
    "0F0,0B0\n": (
        "line 1: a row of actions before any stage; write '# stage 0: embed norm.0 qkv.0' first, or give "
        "the model's layers (--layers L) if torch.distributed.pipelining wrote the file"
    ),
    "# stage 0: embed\n0F0,0B0,x\n": (
        "line 2, cell 3: 'x' is not an action; write one as '3F1', or '3F1.2' for its segment 2"
    ),
    "# stage 0: embed\n0F0\n\n0F1,0Q1\n": "line 4, cell 2: '0Q1' has the unknown pass 'Q'; known: F, B, I, W, R",
    "# stage 0: embed\n0F0\n# stage 1: head.1\n": "line 3: a row of a stage after rows of actions; stages come first",
    "# stage 1: embed\n": "line 1: stage 1, but 0 is next; number stages from 0, in order",
    "# stage 0: embed\n# stage 0: head.1\n": "line 2: stage 0, but 1 is next; number stages from 0, in order",
    "# stge 0: embed\n": "line 1: '# stge 0: embed' is not a stage; write '# stage 0: embed norm.0 qkv.0'",
    "# stage 0 home x: embed\n": (
        "line 1: '# stage 0 home x: embed' is not a stage; write '# stage 0: embed norm.0 qkv.0'"
    ),
    "# stage 0: embed attn\n": "line 1: 'attn' is not a part; write one as 'embed', 'norm.3' or 'head.32'",
    "# stage 0: embed\n" + "0F0" * 20: (
        "line 2, cell 1: '" + ("0F0" * 20)[:40] + "' is not an action; write one as '3F1', or '3F1.2' for its segment 2"
    ),
    "\n": "no stages; write '# stage 0: embed norm.0 qkv.0' first",
}


@pytest.mark.parametrize("text", BAD_CSV)
def test_bad_csv_says_where_and_why(text: str) -> None:
    with pytest.raises(ScheduleError) as error:
        from_csv(text)
    assert str(error.value) == BAD_CSV[text]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='#stage 0123:home,embd.FBIW"{}[]\n\r\t\x00é', max_size=60))
def test_no_text_at_all_does_worse_than_an_error(text: str) -> None:
    for read in (from_csv, from_json):
        try:
            read(text)
        except ScheduleError as error:
            assert len(str(error)) < 300  # noqa: PT017


# torch's files


def test_torchs_file_is_rows_without_stages() -> None:
    schedule = build_schedule("interleaved", ranks=2, layers=5, microbatches=2)
    text = to_torch_csv(schedule)
    assert text == "0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1\n1F0,1F1,3F0,3B0,3F1,3B1,1B0,1B1\n"
    assert from_csv(text, layers=5) == schedule


def test_torchs_idle_cells_overlaps_and_reductions() -> None:
    theirs = ',0F0,,(0F1;0B0)OVERLAP_F_B,0I1,0W1,0REDUCE_GRAD\r\n"","1F0",1B0,, 1F1 ,1B1,1REDUCE_GRAD,\r\n\r\n'
    assert [" ".join(map(str, order)) for order in from_csv(theirs, layers=2).ranks] == [
        "0F0 0F1 0B0 0I1 0W1",
        "1F0 1B0 1F1 1B1",
    ]


def test_layers_are_split_whole_over_torchs_stages() -> None:
    for layers in (2, 3, 7):
        stages = from_csv("0F0,0B0\n1F0,1B0\n", layers).stages
        assert stages == build_schedule("1f1b", ranks=2, layers=layers, microbatches=1).stages


BAD_TORCH_CSV = {
    "0F0,0SEND_F0,0B0": "line 1, cell 2: '0SEND_F0' moves data, which the placement decides here; export with "
    "format='compute_only'",
    "0UNSHARD,0F0,0B0": "line 1, cell 1: '0UNSHARD' moves data, which the placement decides here; export with "
    "format='compute_only'",
    "0F0,0B0\n1RECV_B0": "line 2, cell 1: '1RECV_B0' moves data, which the placement decides here; export with "
    "format='compute_only'",
    "0F0,,0X0": "line 1, cell 3: '0X0' has the unknown operation 'X'; known: F, B, I, W",
    "0F0,0R0,0B0": "line 1, cell 2: '0R0' has the unknown operation 'R'; known: F, B, I, W",
    "0F0,0FORWARD0": "line 1, cell 2: '0FORWARD0' has the unknown operation 'FORWARD'; known: F, B, I, W",
    '"0F0","0B0': "line 1, cell 2: '\"0B0' is not an action of torch's; write one as '3F1'",
    "0F0,0B": "line 1, cell 2: '0B' names no micro-batch; write one as '3F1'",
    "0F0.1": "line 1, cell 1: '0F0.1' is not an action of torch's; write one as '3F1'; segments go with rows that "
    "name the stages",
    "0F0,0B0 and more": "line 1, cell 2: '0B0 and more' is not an action of torch's; write one as '3F1'",
    "0F0,0B0\nthe end": "line 2, cell 1: 'the end' is not an action of torch's; write one as '3F1'",
    "0F0,(0F1;0B0)OVERLAP": "line 1, cell 2: '(0F1;0B0)OVERLAP' is not an action of torch's; write one as '3F1'",
    "0F0,(0F1;0Q0)OVERLAP_F_B": "line 1, cell 2: '0Q0' has the unknown operation 'Q'; known: F, B, I, W",
    "0F0,0B0\n\n1F0,1B0": "line 2: blank, which torch reads as a rank without actions; remove the line",
    "\n0F0,0B0\n1F0,1B0": "line 1: blank, which torch reads as a rank without actions; remove the line",
    "0F0,0B0\n2F0,2B0": "stage 1 has no action, and stage 2 has; number stages from 0",
    "0F0,0B0\n999999999F0": "stage 1 has no action, and stage 999999999 has; number stages from 0",
    ",,\n": "no actions; write a row of them for each rank, such as '0F0,0B0'",
    "0F0,3F0\n1F0\n2F0": "layers: 3, and the rows name 4 stages; give at least 4",
    "0F0,0F1,0B0,0B1\n1F1,1B0,1F2,1B1": "rank 1 has forwards from micro-batch 1 on and backwards from 0 on; "
    "Schedule1F1B of torch 2.13 writes that, though it runs them from 0: count these forwards from 0",
}


@pytest.mark.parametrize("text", BAD_TORCH_CSV)
def test_bad_torch_csv_says_where_and_why(text: str) -> None:
    with pytest.raises(ScheduleError) as error:
        from_csv(text, layers=3)
    assert str(error.value) == BAD_TORCH_CSV[text]


CANNOT_BE_SAID = {
    (
        "helix",
        "none",
    ): "stage 1 (attn.0) runs on ranks 0, 1, and a stage of torch's on one; use a family that keeps its "
    "stages in place, such as 1f1b, or write our own CSV",
    (
        "helix",
        "attention",
    ): "stage 1 (norm.0 qkv.0 attn.0 proj.0) runs on ranks 0, 1, and a stage of torch's on one; use "
    "a family that keeps its stages in place, such as 1f1b, or write our own CSV",
    ("seq1f1b", 2): "rank 0, position 1, action 0F0.1: torch has no segments; build the schedule with segments = 1, or "
    "write our own CSV",
}


@pytest.mark.parametrize(("family", "option"), CANNOT_BE_SAID)
def test_what_torch_cannot_say(family: str, option: str | int) -> None:
    given = {"segments": option} if family == "seq1f1b" else {"travel": option}
    with pytest.raises(ScheduleError) as error:
        to_torch_csv(build_schedule(family, ranks=2, layers=2, microbatches=2, **given))
    assert str(error.value) == CANNOT_BE_SAID[family, option]


def test_what_torch_cannot_say_of_one_rank() -> None:
    instead = "; use a family that keeps its stages in place, such as 1f1b, or write our own CSV"
    split = build_schedule("helix", ranks=1, layers=1, microbatches=1)
    with pytest.raises(ScheduleError) as error:
        to_torch_csv(split)
    assert str(error.value) == (
        "stage 2 (proj.0 mlp.0 head.1) reads x.0 from stage 0, and a stage of torch's only from the one before"
        + instead
    )
    away = build_schedule("1f1b", ranks=2, layers=2, microbatches=1)
    stages = (Stage(away.stages[0].parts, home=1), away.stages[1])
    with pytest.raises(ScheduleError) as error:
        to_torch_csv(Schedule(stages, away.ranks))
    assert str(error.value).endswith("runs on rank 0 and has its weights on rank 1, and torch moves none" + instead)
    again = tuple((order[0], order[0].sibling(Pass.R), *order[1:]) for order in away.ranks)
    with pytest.raises(ScheduleError) as error:
        to_torch_csv(Schedule(away.stages, again))
    assert str(error.value) == (
        "rank 0, position 1, action 0R0: torch has no recompute ahead of the backward; leave R out and let the "
        "backward recompute, or write our own CSV"
    )


def test_layers_go_with_torchs_files_alone(tmp_path: Path) -> None:
    schedule = build_schedule("1f1b", ranks=2, layers=2, microbatches=1)
    for name in ("a.csv", "a.json"):
        save(tmp_path / name, schedule)
        assert load(tmp_path / name, layers=2) == schedule
        with pytest.raises(ScheduleError, match=r"the file has stages of its own, of 2 layers; do not give 3$"):
            load(tmp_path / name, layers=3)
    (tmp_path / "torch.csv").write_text(to_torch_csv(schedule))
    assert load(tmp_path / "torch.csv", layers=2) == schedule
    with pytest.raises(ScheduleError, match=r"torch.csv: line 1: a row of actions before any stage"):
        load(tmp_path / "torch.csv")
    (tmp_path / "empty.csv").write_text("# stage 0:\n")
    with pytest.raises(ScheduleError, match="of 0 layers"):
        load(tmp_path / "empty.csv", layers=3)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123FBIWR();,OVERLAP_F_B.\n ", max_size=60), st.integers(-1, 5))
def test_no_text_of_torchs_does_worse_than_an_error(text: str, layers: int) -> None:
    try:
        from_csv(text, layers)
    except ScheduleError as error:
        assert len(str(error)) < 300  # noqa: PT017


# Files


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_files_round_trip(tmp_path: Path, suffix: str) -> None:
    schedule = build_schedule("helix", ranks=3, layers=4, microbatches=5, travel="attention")
    path = tmp_path / f"schedule.{suffix}"
    save(path, schedule)
    assert load(path) == schedule
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.csv", b"", "the file is empty"),
        ("blank.json", b" \n\n", "the file is empty"),
        ("latin.csv", b"# stage 0: embed\n0F0,\xe90B0\n", "not UTF-8 text (byte 21); save it as UTF-8"),
        ("zip.json", b"PK\x03\x04\xff", "not UTF-8 text (byte 4); save it as UTF-8"),
        ("cut.json", b'{"stages": [', "line 1, column 13: not JSON: Expecting value"),
        ("actions.csv", b"# stage 0: embed\n0F0,0F\n", None),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, reason: str | None) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ScheduleError) as error:
        load(path)
    reason = reason or "line 2, cell 2: '0F' is not an action; write one as '3F1', or '3F1.2' for its segment 2"
    assert str(error.value) == f"{path}: {reason}"


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(b"\xef\xbb\xbf# stage 0: embed block.0 head.1\r\n0F0,0B0\r\n")
    assert load(path).ranks == ((Action(0, Pass.F, 0), Action(0, Pass.B, 0)),)


def test_files_that_are_not_there_or_not_schedules(tmp_path: Path) -> None:
    for path, reason in {
        tmp_path / "no.csv": "cannot be read: no such file or directory",
        tmp_path / "schedule.txt": "a schedule file ends in .json or .csv",
        tmp_path: "a schedule file ends in .json or .csv",
    }.items():
        with pytest.raises(ScheduleError) as error:
            load(path)
        assert str(error.value) == f"{path}: {reason}"
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ScheduleError, match=r"folder.csv: cannot be read: is a directory$"):
        load(tmp_path / "folder.csv")


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = build_schedule("gpipe", ranks=1, layers=1, microbatches=1)
    path = tmp_path / "schedule.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(HelixpipeError, match=r"schedule.json: cannot be written: no space left on device$"):
            save(path, schedule)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["schedule.json"]
    save(path, schedule)
    assert json.loads(path.read_text())["ranks"] == [["0F0", "0B0"]]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    schedule = build_schedule("gpipe", ranks=1, layers=1, microbatches=1)
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    save(tmp_path / "link.csv", schedule)
    assert (tmp_path / "link.csv").is_symlink()
    assert load(tmp_path / "real.csv") == schedule
