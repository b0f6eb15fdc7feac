from __future__ import annotations

from collections.abc import Iterator

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
