"""A refactor changes no lowered program, no predicted second and no predicted byte."""

from __future__ import annotations

import json

from replay import FILE, digests


def test_what_is_derived_is_as_it_was() -> None:
    """Where numbers are meant to change, `python tests/replay/replay.py` writes the digests anew."""
    golden, found = json.loads(FILE.read_text(encoding="utf-8")), digests()
    assert found.keys() == golden.keys()
    moved = {name: [what for what in each if each[what] != golden[name][what]] for name, each in found.items()}
    assert not {name: whats for name, whats in moved.items() if whats}
