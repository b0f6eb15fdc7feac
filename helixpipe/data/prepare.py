"""Preparation: inputs to a folder of tokens, over processes, resumed where it was interrupted."""

from __future__ import annotations

import itertools
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from helixpipe.data.inputs import Input, find
from helixpipe.data.journal import FORMAT, VERSION, Journal
from helixpipe.data.options import Options
from helixpipe.data.records import Span, place
from helixpipe.data.records import units as units_of
from helixpipe.data.shards import MOST_NAMED, Done, Setting, cannot_write, save
from helixpipe.data.tokenizer import Source, end_token, read_source
from helixpipe.data.workers import Job, run
from helixpipe.errors import DataError


def prepare(
    given: Sequence[str],
    tokenizer: str,
    output: str,
    options: Options,
    asked_end: str | None = None,
    workers: int = 1,
    stop_at_bad: bool = True,
) -> dict[str, Any]:
    """Write a folder of tokens; its manifest. Raises HelixpipeError; what is written then is gone on from.

    `asked_end`: the token after each document, its id, "none", or None for the tokenizer's own (after a conversation: none).
    """
    folder = Path(output)
    source = read_source(tokenizer)
    end = None if options.messages and asked_end is None else end_token(source, asked_end)
    inputs, left_out = find(given, folder)
    planned = units_of(inputs, options)
    asked = {
        "tokenizer": source.digest(),
        "options": asdict(options) | {"end": end},
        "inputs": [each._asdict() for each in inputs],
        "units": zlib.crc32(json.dumps(planned).encode("utf-8", "surrogatepass")),
    }
    # made before the folder, so that what is wrong with the tokenizer or its template leaves nothing
    vocabulary = Job(source, options, end, date.today(), Setting("", "", options, True)).tokenizer().vocabulary
    journal = Journal(folder, asked, {"day": date.today().isoformat()})
    if journal.manifest is not None:
        return journal.manifest
    try:
        _carry(source, folder)
        dtype = "uint16" if vocabulary <= 2**16 else "uint32"
        setting = Setting(str(folder), dtype, options, stop_at_bad)
        job = Job(source, options, end, date.fromisoformat(journal.kept["day"]), setting)
        if stop_at_bad:  # what an earlier command passed over stops this one, which comes to it again
            journal.forget([number for number, done in journal.done.items() if done.bad])
        progress = Progress(sum(span.size_bytes for unit in planned for span in unit))
        left = []
        for number, spans in enumerate(planned):
            if number in journal.done:
                progress.tell(sum(span.size_bytes for span in spans), 0)
            else:
                left.append((number, spans))
        progress.begin()
        for done in run(left, workers, job, progress.tell):
            journal.add(done)
        progress.end()
        _check_unchanged(inputs)
        every = [journal.done[number] for number in range(len(planned))]
        first_bad = list(itertools.islice(_named(planned, every), MOST_NAMED))
        manifest = _manifest(asked, every, source, inputs, first_bad, left_out)
        manifest |= {"dtype": dtype, "vocabulary": vocabulary, "day": journal.kept["day"] if options.messages else None}
        for named in first_bad:
            progress.say(f"skipped {named}")
        if manifest["skipped"]["bad"] > len(first_bad):
            progress.say(f"skipped {manifest['skipped']['bad'] - len(first_bad):,} more")
        if not manifest["documents"]:
            raise DataError(_nothing(manifest["skipped"]))
        journal.finish(manifest)
        return manifest
    finally:
        journal.close()


def _carry(source: Source, folder: Path) -> None:
    """Copy the tokenizer's files to the output."""
    try:
        (folder / "tokenizer").mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    for name, content in source.files.items():
        save(folder / "tokenizer" / name, content)


def _named(planned: Sequence[Sequence[Span]], every: Sequence[Done]) -> Iterator[str]:
    """The bad documents that are named, by their lines in the files: those before are added up."""
    before = 0
    for spans, done in zip(planned, every, strict=True):
        for at, (span, lines) in enumerate(zip(spans, done.lines, strict=True)):
            if not span.start:
                before = 0
            for _, number, why in (each for each in done.named if each[0] == at):
                yield f"{place(span, number + before)}: {why}"
            before += lines


def _check_unchanged(inputs: Sequence[Input]) -> None:
    for each in inputs:
        try:
            known = Path(each.path).stat()
        except OSError as error:
            raise DataError(f"'{each.path}' cannot be read any more: {error.strerror}") from None
        if (known.st_size, known.st_mtime_ns) != (each.size_bytes, each.mtime_ns):
            raise DataError(f"'{each.path}' changed while it was prepared; prepare it anew, to a new folder")


def _nothing(skipped: dict[str, Any]) -> str:
    told = ", ".join(f"{skipped[kind]:,} {kind}" for kind in ("bad", "short", "long") if skipped[kind])
    return (
        f"no document is left to prepare{f' ({told})' if told else ''}; see --min-tokens, --max-tokens and the fields"
    )


def _manifest(
    asked: dict[str, Any],
    done: Sequence[Done],
    source: Source,
    inputs: Sequence[Input],
    first_bad: list[str],
    left_out: list[str],
) -> dict[str, Any]:
    shards = [shard for each in done for shard in each.shards]
    lengths = sum((each.lengths for each in done), Counter[int]())
    return {
        "format": FORMAT,
        "version": VERSION,
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "counted": sum(shard.counted for shard in shards),
        "largest_token": max((each.largest for each in done), default=-1),
        "end_token": asked["options"]["end"],
        "lengths": {str(2**power): lengths[power] for power in sorted(lengths)},
        "skipped": {
            "bad": sum(each.bad for each in done),
            "short": sum(each.short for each in done),
            "long": sum(each.long for each in done),
            "first_bad": first_bad,
            "no_files": left_out,
        },
        "options": asked["options"],
        "inputs": [{key: value for key, value in each._asdict().items() if key != "mtime_ns"} for each in inputs],
        "tokenizer": {
            "digest": source.digest(),
            "files": {name: len(each) for name, each in sorted(source.files.items())},
        },
        "shards": [asdict(shard) for shard in shards],
    }


class Progress:
    """Lines on standard error: how far, how fast, how long still. On a terminal one line is written over."""

    def __init__(self, total_bytes: int) -> None:
        self._total, self._bytes, self._tokens = max(total_bytes, 1), 0, 0
        self._terminal = sys.stderr.isatty()
        self._begin_s = self._told_s = time.monotonic()
        self._before = 0

    def begin(self) -> None:
        """What was told until now an earlier command did."""
        self._begin_s = self._told_s = time.monotonic()
        self._before = self._bytes
        if self._bytes:
            self.say(f"goes on from {self._bytes / self._total:.0%}")

    def tell(self, count_bytes: int, tokens: int) -> None:
        self._bytes, self._tokens = self._bytes + count_bytes, self._tokens + tokens
        now_s = time.monotonic()
        if now_s - self._told_s > (0.5 if self._terminal else 10):
            self._told_s = now_s
            self._show("\r" if self._terminal else "", "" if self._terminal else "\n")

    def end(self) -> None:
        self._show("\r" if self._terminal else "", "\n")

    def say(self, text: str) -> None:
        print(("\r\x1b[K" if self._terminal else "") + text, file=sys.stderr, flush=True)

    def _show(self, before: str, after: str) -> None:
        passed_s = max(time.monotonic() - self._begin_s, 1e-9)
        done = self._bytes - self._before
        left_s = passed_s * (self._total - self._bytes) / done if done > 0 else 0.0
        text = (
            f"{self._bytes / self._total:4.0%} of {self._total / 1e6:,.1f} MB  {self._tokens:,} tokens  "
            f"{self._tokens / passed_s:,.0f} tokens/s  {left_s:,.0f} s left"
        )
        print(before + text + ("\x1b[K" if self._terminal else ""), end=after, file=sys.stderr, flush=True)
