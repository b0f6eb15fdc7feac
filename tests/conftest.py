from __future__ import annotations

import os
from collections.abc import Iterator

# before torch: a thread that waits for another spins, and keeps the core from it when both cores are taken
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from ranks import Ranks

# a busy machine is no failure
settings.register_profile("helixpipe", deadline=None)
settings.load_profile("helixpipe")


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()
