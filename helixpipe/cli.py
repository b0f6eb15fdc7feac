"""The command line: what was asked for goes to its command. Bad input is one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from helixpipe import __version__
from helixpipe.errors import ConfigError, HelixpipeError, nearest

USAGE = """\
usage: helixpipe COMMAND [options]

  prepare    text, JSON lines, Parquet and chats to tokens, with a tokenizer of Hugging Face's
  train      train a model: helixpipe train [config.toml] [--section.key value ...]
  evaluate   a checkpoint's loss on held-out data, in all and by position in the sequence
  plan       the best schedules for a model, a sequence length, a cluster and its memory
  simulate   predicted time, bubble and memory of a schedule
  rehearse   the real runtime and real messages on this machine, with stages that sleep
  export     a run's weights as a Hugging Face folder, which transformers loads
  show       a schedule as a staircase in the terminal, or as SVG, CSV, JSON
  check      whether a schedule file can run, or the reason why not
  profile    measure this machine, for the commands above
  compare    a run's predicted step against its measured one

helixpipe COMMAND --help tells a command's options; helixpipe --version the version.
"""
COMMANDS = (
    "prepare",
    "train",
    "evaluate",
    "plan",
    "simulate",
    "rehearse",
    "export",
    "show",
    "check",
    "profile",
    "compare",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 2 bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        for word in given:
            if "\0" in word:
                raise ConfigError(f"'{word}': a null byte, which nothing that is given may have; leave it out")
        code = _command(given)
        sys.stdout.flush()
        return code
    except HelixpipeError as error:
        return _failed(str(error))
    except BrokenPipeError:  # whoever read our output has enough; nothing more may be written, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of a path that may be seen and not opened, or not listed, wherever that is found out
        if error.filename is None:
            raise
        return _failed(f"{os.fsdecode(error.filename)}: {(error.strerror or str(error)).lower()}")


def _failed(text: str) -> int:
    print(f"helixpipe: error: {_one_line(text)}", file=sys.stderr)
    return 2


def _command(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE, end="", file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    if given[0] == "--version":
        print(f"helixpipe {__version__}")
        return 0
    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        raise ConfigError(f"'{name}' is not a command{nearest(name, COMMANDS)}")
    # each is imported when it is asked for: train brings torch in
    code: int = getattr(import_module(f"helixpipe.commands.{name}"), name)(rest)
    return code


def _one_line(text: str) -> str:
    """Text without line breaks or control characters, whatever a file or an argument held."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
