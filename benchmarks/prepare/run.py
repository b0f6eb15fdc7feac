"""What does `helixpipe prepare` cost over its tokenizer alone? `python benchmarks/prepare/run.py`

Documents of about 4 kB, pieces of the standard library's source, as JSON lines; a byte-level BPE of 8,000 words trained on
them, or `--tokenizer FOLDER`. The tokenizer alone: as many processes as prepare has workers, each with its share of the
texts in memory and its tokenizer loaded before the clock starts, asked for ids in batches. prepare: the whole command, from
the start of Python to the manifest. Rounds are interleaved; medians of the rounds' ratios, in tokens a second by the wall clock
and in processor seconds of all processes, which do not see who else is on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

LETTERS, WORDS, BATCH = 4000, 8000, 128
END = "<|end|>"


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float
    tokens: int


def source_texts() -> list[str]:
    """Pieces of the standard library's source."""
    found = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    texts = [path.read_text("utf-8", "ignore") for path in found if "site-packages" not in path.parts]
    return [text[at : at + LETTERS] for text in texts for at in range(0, len(text), LETTERS)]


def write_input(file: Path, texts: list[str], megabytes: float) -> None:
    def lines() -> Iterator[str]:
        while True:
            yield from (json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts))

    left = megabytes * 1e6
    with file.open("w", encoding="utf-8") as out:
        for line in lines():
            if left <= 0:
                return
            left -= out.write(line)


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts[::8], trainer)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))


def alone(tokenizer: Path, file: Path, workers: int) -> Cost:
    given = [sys.executable, __file__, "--share", str(tokenizer), str(file)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    shares = [
        subprocess.Popen(
            [*given, str(number), str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(workers)
    ]
    for share in shares:
        assert share.stdout is not None
        share.stdout.readline()  # it is ready
    begin_s = time.monotonic()
    for share in shares:
        assert share.stdin is not None
        share.stdin.write("go\n")
        share.stdin.flush()
    found = [json.loads(share.communicate()[0]) for share in shares]
    wall_s = time.monotonic() - begin_s
    return Cost(wall_s, sum(each["cpu_s"] for each in found), sum(each["tokens"] for each in found))


def share_of(tokenizer: str, file: str, number: int, workers: int) -> None:
    """One process of the tokenizer alone."""
    library = tokenizers.Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    with open(file, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for at, line in enumerate(lines) if at % workers == number]
    print("ready", flush=True)
    sys.stdin.readline()
    begin_s, tokens = time.process_time(), 0
    for at in range(0, len(texts), BATCH):
        tokens += sum(len(each.ids) for each in library.encode_batch_fast(texts[at : at + BATCH]))
    print(json.dumps({"cpu_s": time.process_time() - begin_s, "tokens": tokens}))


def prepare(tokenizer: Path, file: Path, workers: int, output: Path) -> Cost:
    shutil.rmtree(output, ignore_errors=True)
    given = ["prepare", str(file), "--tokenizer", str(tokenizer), "--output", str(output), "--workers", str(workers)]
    begin_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "helixpipe", *given, "--json"],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    wall_s, after = time.monotonic() - begin_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads(done.stdout)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall_s, cpu_s, told["tokens"] - told["documents"])  # less the end tokens


def compare(tokenizer: Path, file: Path, workers: int, rounds: int, output: Path) -> None:
    pairs = []
    for number in range(rounds):
        print(f"{workers} workers, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        if number % 2:
            ours = prepare(tokenizer, file, workers, output)
            pairs.append((ours, alone(tokenizer, file, workers)))
        else:
            theirs = alone(tokenizer, file, workers)
            pairs.append((prepare(tokenizer, file, workers, output), theirs))
    assert all(ours.tokens == theirs.tokens for ours, theirs in pairs)
    wall = [ours.wall_s / theirs.wall_s for ours, theirs in pairs]
    cpu = [ours.cpu_s / theirs.cpu_s for ours, theirs in pairs]
    rates = [[each.tokens / each.wall_s for each in column] for column in zip(*pairs, strict=True)]
    spent = [[each.cpu_s for each in column] for column in zip(*pairs, strict=True)]
    cells = [
        str(workers),
        *(f"{statistics.median(each):,.0f}" for each in rates),
        f"{statistics.median(wall):.3f} ({min(wall):.3f} to {max(wall):.3f})",
        *(f"{statistics.median(each):.2f}" for each in spent),
        f"{statistics.median(cpu):.3f} ({min(cpu):.3f} to {max(cpu):.3f})",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--share", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.share:
        share_of(args.share[0], args.share[1], int(args.share[2]), int(args.share[3]))
        return
    with tempfile.TemporaryDirectory() as place:
        folder, texts = Path(place), source_texts()
        write_input(folder / "in.jsonl", texts, args.megabytes)
        tokenizer = args.tokenizer or folder / "tokenizer"
        if args.tokenizer is None:
            write_tokenizer(tokenizer, texts)
        print(
            "| workers | prepare, tokens/s | alone, tokens/s | time over alone | prepare, CPU s | alone, CPU s | CPU over alone |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for workers in args.workers:
            compare(tokenizer, folder / "in.jsonl", workers, args.rounds, folder / "out")


if __name__ == "__main__":
    main()
