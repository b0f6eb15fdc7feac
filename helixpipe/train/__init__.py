"""The program people run: data, loop, optimizer, checkpoint, launch, log. `main` is `helixpipe train`, `evaluate` the other.

command line ── prepare ──► Job ── launch ──► one `worker` a rank ──► `loop.train` or `evaluate.evaluate`
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["evaluate", "main"]


def main(arguments: Sequence[str]) -> int:
    """`helixpipe train [config.toml] [--section.key value ...] [--resume [PATH]]`; the exit code.

    Raises HelixpipeError for bad input. torch is imported only once all of that has been checked.
    """
    if "--help" in arguments or "-h" in arguments:
        from helixpipe.train.help import show_help

        return show_help("train")
    from helixpipe.train.job import prepare
    from helixpipe.train.launch import launch

    return launch(arguments, prepare)


def evaluate(arguments: Sequence[str]) -> int:
    """`helixpipe evaluate [config.toml] [--section.key value ...] --resume [PATH] [--json]`; the exit code. As `main`."""
    if "--help" in arguments or "-h" in arguments:
        from helixpipe.train.help import show_help

        return show_help("evaluate")
    from helixpipe.train.job import prepare_evaluation
    from helixpipe.train.launch import launch

    return launch(arguments, prepare_evaluation)
