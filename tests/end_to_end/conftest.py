from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import Run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start runs in tmp_path; none is left when the test ends."""
    runs: list[Run] = []

    def begin(*arguments: str, **more: Any) -> Run:
        runs.append(Run(tmp_path, *arguments, **more))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
