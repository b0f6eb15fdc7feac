"""docs/schedules: its drawings, pictures, numbers and commands are what the package makes today."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from helixpipe.cli import main
from helixpipe.schedule.families import FAMILIES

DOCS = Path(__file__).parents[2] / "docs" / "schedules"
PAGES = list(FAMILIES)


def commands() -> list[tuple[str, list[str]]]:
    """(page, arguments) of every `helixpipe show` in the pages."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        for line in re.findall(r"^    helixpipe (show .*?)(?:   .*)?$", page.read_text(encoding="utf-8"), re.MULTILINE):
            found += [(page.stem, line.split())]
    return found


@pytest.mark.parametrize("family", PAGES)
def test_the_picture_is_what_its_command_draws(family: str, tmp_path: Path) -> None:
    (arguments,) = [arguments for page, arguments in commands() if page == family]
    assert arguments[-2:] == ["--svg", f"docs/schedules/{family}.svg"]
    assert main([*arguments[:-1], str(tmp_path / "now.svg"), "--json"]) == 0
    now = (tmp_path / "now.svg").read_text(encoding="utf-8")
    assert now == (DOCS / f"{family}.svg").read_text(encoding="utf-8"), f"helixpipe {' '.join(arguments)}"


@pytest.mark.parametrize("family", PAGES)
def test_the_page_draws_the_docstring_s_staircase(family: str) -> None:
    import sys

    doc = sys.modules[FAMILIES[family].__module__].__doc__
    rows = [line.strip() for line in doc.splitlines() if line.strip().startswith("rank ")]
    page = [line.strip() for line in (DOCS / f"{family}.md").read_text(encoding="utf-8").splitlines()]
    assert rows
    assert [line for line in page if line.startswith("rank ")] == rows


def test_the_index_s_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = [arguments for page, arguments in commands() if page == "README"]
    assert len(ran) >= 3
    for arguments in ran:
        assert main(arguments) == 0
    assert main(["check", "helix.csv"]) == 0
    assert main(["check", "1f1b.csv", "--layers", "4"]) == 0


def test_the_table_is_what_the_script_prints_and_the_pages_quote_it() -> None:
    where = importlib.util.spec_from_file_location("options", DOCS / "options.py")
    script = importlib.util.module_from_spec(where)
    where.loader.exec_module(script)
    table = script.table(16)
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert "\n".join(table) in index
    quoted = re.findall(r"\b1\.\d{3}\b|\b\d{3}(?= GiB)", (DOCS / "helix.md").read_text(encoding="utf-8"))
    assert len(quoted) > 15
    assert {number for number in quoted if number not in "\n".join(table)} == set()


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.stem == "README" or f"({page.name})" in index
    for page in DOCS.glob("*.md"):  # and every link leads somewhere
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (DOCS / link).exists(), f"{page.name}: {link}"
