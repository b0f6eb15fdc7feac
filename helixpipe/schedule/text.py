"""Schedules as text: JSON, and CSV with one row of actions per rank as torch.distributed.pipelining writes them.

    {"stages": [{"parts": "embed norm.0 qkv.0", "home": null},     # stage 0: embed norm.0 qkv.0
                {"parts": "norm.1 qkv.1 attn.1", "home": 1}, ...],  # stage 1 home 1: norm.1 qkv.1 attn.1
     "ranks": [["0F0", "0F1", "1F0"], ...]}                         0F0,0F1,1F0

Both say all that a schedule holds: what is read back equals what was written. Neither is checked here.
A stage's row in CSV is a comment to spreadsheets. A CSV without any is read as torch's (see `torch_text`), when
the caller says how many layers the model has. An empty cell is a rank standing idle; it means nothing here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helixpipe.errors import ScheduleError, nearest
from helixpipe.files import read_text, write_text
from helixpipe.parts.part import Part
from helixpipe.schedule.action import Action
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage
from helixpipe.schedule.torch_text import read_cell, whole_layers

STAGE_ROW = re.compile(r"#\s*stage\s+([0-9]{1,9})(?:\s+home\s+([0-9]{1,9}))?\s*:(.*)")
EXAMPLE = "embed norm.0 qkv.0"
LONGEST = 40  # letters; no action or part has as many, and errors quote no more


def load(path: str | os.PathLike[str], layers: int | None = None) -> Schedule:
    """Read a `.json` or `.csv` file, not yet checked; raises ScheduleError that names file, place and fault.

    `layers`: the model's, for a CSV of torch.distributed.pipelining, which does not tell.
    """
    suffix = _suffix(path)
    text = read_text(path, ScheduleError)
    try:
        schedule = from_json(text) if suffix == ".json" else from_csv(text, layers)
        own = max((part.layer for stage in schedule.stages for part in stage.parts), default=0)
        if layers not in (None, own):
            raise ScheduleError(f"the file has stages of its own, of {own} layers; do not give {layers}")
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None
    return schedule


def save(path: str | os.PathLike[str], schedule: Schedule) -> None:
    """Write a `.json` or `.csv` file, whole or not at all; raises HelixpipeError."""
    write = {".json": to_json, ".csv": to_csv}[_suffix(path)]
    write_text(path, write(schedule))


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".csv"):
        raise ScheduleError(f"{path}: a schedule file ends in .json or .csv")
    return suffix


def to_json(schedule: Schedule) -> str:
    """JSON, one line per stage and per rank."""
    stages = [json.dumps({"parts": str(stage), "home": stage.home}) for stage in schedule.stages]
    ranks = [json.dumps(list(map(str, order))) for order in schedule.ranks]
    return "\n".join(['{"stages": [', ",\n".join(stages), '], "ranks": [', ",\n".join(ranks), "]}"]) + "\n"


def from_json(text: str) -> Schedule:
    """The schedule that `to_json` wrote; raises ScheduleError with the place."""
    try:
        found = json.loads(text, object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        raise ScheduleError(f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
        raise ScheduleError(f"not JSON: {error}") from None
    top = _object(found, "the file", {"stages", "ranks"})
    stages = [_stage(given, f"stages[{s}]") for s, given in enumerate(_list(top["stages"], "stages"))]
    if not stages:
        raise ScheduleError("stages: no stages; name each stage's parts")
    orders = []
    for rank, row in enumerate(_list(top["ranks"], "ranks")):
        cells = _list(row, f"ranks[{rank}]")
        orders.append(tuple(_action(cell, f"ranks[{rank}][{at}]") for at, cell in enumerate(cells)))
    return Schedule(tuple(stages), tuple(orders))


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ScheduleError(f"the key '{key}' is there twice; remove one")
        found[key] = value
    return found


def _object(found: object, place: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ScheduleError(f"{place}: not an object; write {{{', '.join(sorted(keys))}}}")
    for key in found:
        if key not in keys:
            raise ScheduleError(f"{place}: unknown key '{key}'{nearest(key, sorted(keys))}")
    for key in sorted(keys, reverse=True):
        if key not in found:
            raise ScheduleError(f"{place}: the key '{key}' is missing")
    return found


def _list(found: object, place: str) -> list[Any]:
    if not isinstance(found, list):
        raise ScheduleError(f"{place}: not a list")
    return found


def _stage(found: object, place: str) -> Stage:
    stage = _object(found, place, {"parts", "home"})
    parts, home = stage["parts"], stage["home"]
    if not isinstance(parts, str):
        raise ScheduleError(f"{place}.parts: not a text of parts such as 'proj.0 mlp.0'")
    if home is not None and (type(home) is not int or home < 0):
        raise ScheduleError(f"{place}.home: {json.dumps(home)} is not a rank; give a rank's number or null")
    return Stage(_parts(parts, f"{place}.parts"), home)


def _parts(text: str, place: str) -> tuple[Part, ...]:
    try:
        return tuple(Part.parse(word[:LONGEST]) for word in text.split())
    except ScheduleError as error:
        raise ScheduleError(f"{place}: {error}") from None


def _action(cell: object, place: str) -> Action:
    if not isinstance(cell, str):
        raise ScheduleError(f'{place}: {json.dumps(cell)} is not an action; write one as "3F1"')
    try:
        return Action.parse(cell[:LONGEST])
    except ScheduleError as error:
        raise ScheduleError(f"{place}: {error}") from None


def to_csv(schedule: Schedule) -> str:
    """CSV: the stages as comment rows, then one row of actions per rank."""
    rows = []
    for s, stage in enumerate(schedule.stages):
        home = "" if stage.home is None else f" home {stage.home}"
        rows.append(f"# stage {s}{home}: {stage}")
    # a rank without actions is one empty cell, quoted: an empty row would be no row
    rows += [",".join(map(str, order)) or '""' for order in schedule.ranks]
    return "\n".join(rows) + "\n"


def from_csv(text: str, layers: int | None = None) -> Schedule:
    """The schedule that `to_csv` wrote; raises ScheduleError with line and cell. Blank lines are no rows.

    With `layers`, the model's, also one that names no stages, as torch.distributed.pipelining writes it.
    """
    rows = {n: row.strip() for n, row in enumerate(re.split(r"\r\n|\r|\n", text), start=1) if row.strip()}
    if layers is not None and not any(row.startswith("#") for row in rows.values()):
        return _from_torch_rows(rows, layers)
    stages: list[Stage] = []
    orders: list[tuple[Action, ...]] = []
    for line, row in rows.items():
        if row.startswith("#"):
            if orders:
                raise ScheduleError(f"line {line}: a row of a stage after rows of actions; stages come first")
            stages.append(_stage_row(row, len(stages), f"line {line}"))
            continue
        if not stages:
            raise ScheduleError(
                f"line {line}: a row of actions before any stage; write '# stage 0: {EXAMPLE}' first, or give "
                "the model's layers (--layers L) if torch.distributed.pipelining wrote the file"
            )
        orders.append(tuple(_action(cell, place) for place, cell in _cells(row, line)))
    if not stages:
        raise ScheduleError(f"no stages; write '# stage 0: {EXAMPLE}' first")
    return Schedule(tuple(stages), tuple(orders))


def _from_torch_rows(rows: dict[int, str], layers: int) -> Schedule:
    """Line -> row, as torch wrote them."""
    blank = next((line for line in range(1, max(rows, default=0)) if line not in rows), None)
    if blank is not None:  # skipped here, the ranks after it would move up
        raise ScheduleError(f"line {blank}: blank, which torch reads as a rank without actions; remove the line")
    orders = [
        tuple(action for place, cell in _cells(row, line) for action in read_cell(cell, place))
        for line, row in rows.items()
    ]
    return Schedule(whole_layers(orders, layers), tuple(orders))


def _cells(row: str, line: int) -> Iterator[tuple[str, str]]:
    """(place, text) of the cells of a row that are not empty."""
    for at, cell in enumerate(row.split(","), start=1):
        text = cell.strip()
        quoted = len(text) > 1 and text[0] == text[-1] == '"'
        if text := text[1:-1] if quoted else text:
            yield f"line {line}, cell {at}", text


def _stage_row(row: str, number: int, place: str) -> Stage:
    match = STAGE_ROW.fullmatch(row)
    if not match:
        raise ScheduleError(f"{place}: '{row[:LONGEST]}' is not a stage; write '# stage {number}: {EXAMPLE}'")
    if int(match[1]) != number:
        raise ScheduleError(f"{place}: stage {match[1]}, but {number} is next; number stages from 0, in order")
    return Stage(_parts(match[3], place), None if match[2] is None else int(match[2]))
