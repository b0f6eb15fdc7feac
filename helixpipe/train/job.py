"""Job: a run made ready. Every check that needs no other rank is made here, before anything starts or is written."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from helixpipe.config import Config
from helixpipe.config_data import Sources
from helixpipe.config_text import Arguments, Table, build_config, merged, parse_arguments, read_toml, renewed, to_table
from helixpipe.errors import CheckpointError, ConfigError
from helixpipe.files import fault
from helixpipe.train import manifest as manifests
from helixpipe.train.data import Corpus, open_corpus
from helixpipe.train.initial import check_model
from helixpipe.train.manifest import Manifest
from helixpipe.train.mask_token import with_mask_token
from helixpipe.train.sinks.sink import check_sinks

_RUNS = Path("runs")
# of a run, in bytes: file systems allow 255, and a number comes behind it
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Job:
    """What every rank is told: the resolved config, and the verified checkpoint to continue."""

    config: Config
    checkpoint: Path | None
    step: int
    """Training steps that the checkpoint has done; 0 without one."""
    task: Literal["train", "evaluate"] = "train"
    as_json: bool = False
    """Whether an evaluation is told as one JSON object."""
    numbered: bool = False
    """Whether the run folder has a number of our choice, so that another will do."""
    afresh: bool = False
    """Whether the run folder holds a run that came to no checkpoint, which starts again."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def to_json(self) -> str:
        checkpoint = self.checkpoint and str(self.checkpoint)
        others = self.step, self.task, self.as_json, self.numbered, self.afresh
        return json.dumps([to_table(self.config), checkpoint, *others])

    @staticmethod
    def from_json(text: str) -> Job:
        table, checkpoint, *others = json.loads(text)
        return Job(build_config(table), checkpoint and Path(checkpoint), *others)


class Prepare(Protocol):
    """What makes a job of a command line, for the launcher; raises HelixpipeError. Writes nothing.

    `ranks`: how many torchrun started, None when the launcher starts as many as the config says. `warn` is told, a line at a
    time, what a user should know but need not mend.
    """

    def __call__(self, arguments: Sequence[str], warn: Callable[[str], None], ranks: int | None = None) -> Job: ...


def prepare(arguments: Sequence[str], warn: Callable[[str], None], ranks: int | None = None) -> Job:
    """A job of training."""
    given = parse_arguments(arguments)
    config, checkpoint, manifest = _read(given, warn, ranks, may_begin=True)
    check_sinks(config.run.log)
    config = with_mask_token(config)
    check_model(config, checkpoint)
    corpus = open_corpus(config)
    data = corpus.fingerprint()
    is_auto = config.run.resume == "auto"
    config, numbered = _resolved(config, given, checkpoint)
    if manifest and checkpoint:
        manifests.check_shape(manifest, config.shape(), checkpoint)
        if manifest.step >= config.train.steps and not is_auto:
            raise ConfigError(
                f"train.steps: {config.train.steps}, and {checkpoint} has done {manifest.step}; raise it to continue"
            )
        _tell_changes(renewed(manifest.config), config, warn)
        _tell_other_data(manifest.data, data, warn)
    _tell_remarks(corpus, config, warn)
    step = manifest.step if manifest else 0
    return Job(config, checkpoint, step, numbered=numbered, afresh=is_auto and checkpoint is None)


def prepare_evaluation(arguments: Sequence[str], warn: Callable[[str], None], ranks: int | None = None) -> Job:
    """A job of evaluating: `--json` among the arguments of a training run."""
    given = parse_arguments([word for word in arguments if word != "--json"])
    config, checkpoint, manifest = _read(given, warn, ranks)
    if manifest is not None and checkpoint is not None:
        manifests.check_shape(manifest, config.shape(), checkpoint, weights_alone=True)
    elif not config.model.path:
        raise ConfigError(
            "--resume: missing, and random weights tell nothing; give --resume RUN_OR_CHECKPOINT, or --model.path FOLDER"
        )
    config = with_mask_token(config)
    check_model(config, checkpoint)
    corpus = open_corpus(config)
    if not len(corpus.held_out):
        raise ConfigError("data.held_out: 0, so there is nothing to evaluate on; give a share of the data, such as 0.1")
    if manifest is not None:
        _tell_changes(renewed(manifest.config), config, warn, "evaluating", ("model", "runtime"))
        _tell_other_data(manifest.data, corpus.fingerprint(), warn, "evaluating")
    _tell_remarks(corpus, config, warn)
    return Job(_anywhere(config), checkpoint, manifest.step if manifest else 0, "evaluate", "--json" in arguments)


def _read(
    given: Arguments, warn: Callable[[str], None], ranks: int | None, may_begin: bool = False
) -> tuple[Config, Path | None, Manifest | None]:
    """The config of a command line, and the checkpoint that it goes on from: without a config file, its config is beneath.

    `may_begin`: whether a bare --resume that finds no checkpoint is a start, so that one command both starts and goes on.
    """
    over = _over(given)
    resume = over.get("run", {}).get("resume", "")
    checkpoint, manifest = None, None
    try:
        checkpoint, manifest = _find(resume, over, given, warn) if resume else (None, None)
    except _NothingThere as nothing:
        if resume != "auto" or not may_begin:
            raise
        what, _, _ = str(nothing).partition("; ")
        warn(f"{what}; starting from the beginning")
    base = renewed(manifest.config) if manifest and given.path is None else {}
    base = {section: keys for section, keys in base.items() if section != "run"} | _kept_run_keys(base)
    config = build_config(merged(base, over), ranks)
    if ranks is not None:
        config.mesh_shape().check_ranks(ranks)
    return config, checkpoint, manifest


def _over(given: Arguments) -> Table:
    """The config file with the command line on top."""
    return merged(read_toml(given.path) if given.path else {}, given.overrides)


def _kept_run_keys(base: Table) -> Table:
    """Of the run that is continued, all but where it was: it may have been moved."""
    run = {key: value for key, value in base.get("run", {}).items() if key != "folder"}
    return {"run": run} if run else {}


class _NothingThere(CheckpointError):
    """There is no checkpoint, not even a bad one."""


def _find(resume: str, over: Table, given: Arguments, warn: Callable[[str], None]) -> tuple[Path, Manifest]:
    """The checkpoint to continue: a good one, or an error."""
    folder = _latest_run(over, given) if resume == "auto" else Path(resume)
    if why := fault(folder / manifests.NAME):
        raise CheckpointError(f"--resume {folder}: {why}; give a run folder or one of its checkpoints")
    if resume != "auto":
        if not folder.is_dir():
            raise CheckpointError(f"--resume {resume}: no such folder; give a run folder or one of its checkpoints")
        if (folder / manifests.NAME).exists() or folder.name.startswith("step-"):
            return folder.resolve(), manifests.verify(folder)
    inside = folder if folder.name == "checkpoints" else folder / "checkpoints"
    if not manifests.checkpoints(inside):
        raise _NothingThere(f"--resume: no checkpoint in {inside}; start anew without --resume, in a new folder")
    found = manifests.find_newest(inside, warn)
    if found is None:
        raise CheckpointError(f"--resume: no good checkpoint in {inside}; start anew without --resume, in a new folder")
    return found[0].resolve(), found[1]


def _latest_run(over: Table, given: Arguments) -> Path:
    """The folder that a bare --resume means."""
    if over.get("run", {}).get("folder"):
        return Path(over["run"]["folder"])
    name = _name(over.get("run", {}).get("name", ""), given)
    numbers = _numbers(name)
    if not numbers:
        raise _NothingThere(f"--resume: no run {_RUNS / name}-<number> here; give --resume PATH or --run.folder")
    return _RUNS / f"{name}-{numbers[-1]}"


def _resolved(config: Config, given: Arguments, checkpoint: Path | None) -> tuple[Config, bool]:
    """The config with its run folder decided: the given one, the continued one, or a new one; whether that is by a number."""
    name = _name(config.run.name, given)
    may_be_used = config.run.resume == "auto"
    continued = checkpoint.parent.parent if checkpoint and checkpoint.parent.name == "checkpoints" else None
    if config.run.folder:
        folder = Path(os.path.realpath(config.run.folder))
        if folder != continued:
            refuse_used(folder, may_be_used)
    else:
        last = (_numbers(name) or [0])[-1]
        folder = continued or (_RUNS / f"{name}-{last if last and may_be_used else last + 1}").resolve()
    run = dataclasses.replace(config.run, name=name, folder=str(folder), resume="")
    is_numbered = not config.run.folder and continued is None
    return _anywhere(dataclasses.replace(config, run=run)), is_numbered


def _anywhere(config: Config) -> Config:
    """The config with paths that mean the same wherever it is read."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=_absolute_sources(config.data.path)),
        model=dataclasses.replace(
            config.model,
            path=_absolute(config.model.path or "") or None,
            adapter=_absolute(config.model.adapter or "") or None,
        ),
        schedule=dataclasses.replace(config.schedule, profile=_absolute(config.schedule.profile)),
    )


def _absolute(path: str) -> str:
    """Of "", itself."""
    return os.path.realpath(path) if path else ""


def _absolute_sources(given: Sources) -> Sources:
    if isinstance(given, str):
        return _absolute(given)
    return tuple(dataclasses.replace(each, path=_absolute(each.path)) for each in given)


def refuse_used(folder: Path, may_be_used: bool = False) -> None:
    """Raise ConfigError when a new run would write over another, or nothing can be written.

    `may_be_used`: by a run that came to no checkpoint.
    """
    if why := fault(folder / "config.toml"):
        raise ConfigError(f"run.folder: '{folder}' cannot be made: {why}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.folder: '{folder}' is a file; choose another folder")
    is_used = (folder / "config.toml").exists() or (folder / "checkpoints").exists()
    if is_used and not (may_be_used and not manifests.checkpoints(folder / "checkpoints")):
        raise ConfigError(
            f"run.folder: '{folder}' has a run already; continue it with --resume or choose another folder"
        )


def _name(name: str, given: Arguments) -> str:
    name = name or (Path(given.path).stem if given.path else "default")
    if not re.fullmatch(r"[^/\0]+", name) or name.startswith(".") or len(os.fsencode(name)) > _LONGEST_NAME:
        raise ConfigError(
            f"run.name: '{name}' will not do for a folder; use letters, digits and dashes, {_LONGEST_NAME} at most"
        )
    return name


def _numbers(name: str) -> list[int]:
    """The numbers of the runs of this name, ascending."""
    if not os.path.isdir(_RUNS):
        return []
    matches = (re.fullmatch(re.escape(name) + r"-(\d+)", path.name) for path in _RUNS.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _tell_changes(
    before: Table,
    config: Config,
    warn: Callable[[str], None],
    doing: str = "continuing",
    sections: tuple[str, ...] = tuple(to_table(Config())),
) -> None:
    """One line for what is otherwise than in the run that wrote the checkpoint."""
    now = {section: keys for section, keys in to_table(config).items() if section in sections}
    changes = [
        f"{section}.{key} {before.get(section, {}).get(key, 'unset')} -> {keys.get(key, 'unset')}"
        for section, keys in now.items()
        for key in sorted({*keys, *before.get(section, {})})
        # where and how it is computed is no change, in what precision is one
        if (section not in ("run", "runtime") or key == "dtype") and keys.get(key) != before.get(section, {}).get(key)
    ]
    if changes:
        warn(f"{doing} with changes: {', '.join(changes)}")


def _tell_remarks(corpus: Corpus, config: Config, warn: Callable[[str], None]) -> None:
    """What is remarkable about the data, and where it has fewer held-out windows than are asked for."""
    for remark in corpus.remarks:
        warn(remark)
    mask = config.train.mask_token
    if mask is not None and (own := int((corpus.batch(1).tokens == mask).sum())):
        warn(
            f"train.mask_token: {mask}, and {own:,} tokens of the first batch are it, which no model can tell from masked ones; "
            "give an id that the data does not have"
        )
    asked, length = config.train.evaluate_sequences, config.train.sequence_length
    count = corpus.windows(asked)
    if len(corpus.held_out) and count < asked:
        room = (
            f"the {len(corpus.held_out):,} tokens held out have room for {count} of {length:,} side by side"
            if config.data.packing == "windows"
            else f"the documents held out fill {count}"
        )
        warn(f"train.evaluate_sequences: {asked}, and {room}: {count} will be evaluated")


def _tell_other_data(
    before: tuple[int, ...], now: tuple[int, ...], warn: Callable[[str], None], doing: str = "continuing"
) -> None:
    """One line where the tokens are other ones than those of the run that wrote the checkpoint, if these are known."""
    if before and before != now:
        counts = [f"{training:,} tokens and {held_out:,} held out" for training, held_out, _ in (before, now)]
        what = f"{counts[0]} -> {counts[1]}" if counts[0] != counts[1] else f"{counts[0]}, not the same ones"
        warn(f"{doing} with other data: {what}")
