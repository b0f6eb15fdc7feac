"""`helixpipe train [config.toml]`"""

from __future__ import annotations


def train(given: list[str]) -> int:
    """Train: `helixpipe.train`, which brings torch in."""
    from helixpipe.train import main as run

    return run(given)
