"""`helixpipe evaluate [config.toml] --resume RUN_OR_CHECKPOINT`"""

from __future__ import annotations


def evaluate(given: list[str]) -> int:
    """Evaluate: `helixpipe.train`, which brings torch in."""
    from helixpipe.train import evaluate as run

    return run(given)
