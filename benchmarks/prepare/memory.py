"""Does the memory of `helixpipe prepare` grow with its input? `python benchmarks/prepare/memory.py --gigabytes 0.1 1 10`

The input is one gzip file, the hardest case: a packed file is one unit of work, whatever its size. It is made of the same
100 MB over and over, a member each, so that 10 GB take some megabytes on disk. The tokenizer knows words of a hundred letters,
so that most of the time is prepare's own. Peak: the most resident memory of the largest process, as the system tells it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

MEMBER_BYTES, LINE_BYTES, WORD = 10**8, 50_000, 100


def write_tokenizer(folder: Path) -> list[str]:
    """Its words."""
    words = [f"{number:04}" * ((WORD - 1) // 4) for number in range(1000)]
    made = tokenizers.Tokenizer(
        models.WordLevel({word: at for at, word in enumerate([*words, "<|end|>"])}, unk_token="<|end|>")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return words


def member(words: list[str]) -> bytes:
    """100 MB of documents, packed."""
    count = LINE_BYTES // (WORD + 1)
    lines = [
        json.dumps({"text": " ".join(words[(at * 7 + i) % len(words)] for i in range(count))}).encode() + b"\n"
        for at in range(50)
    ]
    whole = b"".join(lines)
    return gzip.compress(whole * (MEMBER_BYTES // len(whole)), 1)


def measure(folder: Path, packed: bytes, gigabytes: float) -> None:
    file, output = folder / f"{gigabytes}.jsonl.gz", folder / f"out-{gigabytes}"
    with file.open("wb") as out:
        for _ in range(round(gigabytes * 1e9 / MEMBER_BYTES)):
            out.write(packed)
    given = ["prepare", str(file), "--tokenizer", str(folder / "tokenizer"), "--output", str(output), "--workers", "1"]
    begin_s = time.monotonic()
    running = subprocess.Popen([sys.executable, "-m", "helixpipe", *given, "--json"], stdout=subprocess.PIPE)
    assert running.stdout is not None
    told = json.loads(running.stdout.read())
    _, status, used = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    assert running.returncode == 0
    print(
        f"| {gigabytes} GB | {told['documents']:,} | {told['tokens']:,} | {used.ru_maxrss / 1024:,.0f} MiB | "
        f"{used.ru_utime + used.ru_stime:.1f} | {time.monotonic() - begin_s:.0f} |", flush=True
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1.0])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        packed = member(write_tokenizer(folder / "tokenizer"))
        print(
            "| input | documents | tokens | peak resident | CPU s | wall s |\n| --- | --- | --- | --- | --- | --- |",
            flush=True,
        )
        for gigabytes in args.gigabytes:
            measure(folder, packed, gigabytes)


if __name__ == "__main__":
    main()
