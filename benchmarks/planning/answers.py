"""What does `helixpipe plan --accelerators` answer? `python benchmarks/planning/answers.py --record answers.jsonl`

Each question is a model, a length, a number of accelerators and a machine; a batch is about 4 million tokens, or one sequence for each
accelerator's node where that is more. The command is run as a user would, and its answer is a line of the record, so that a page that
was cut goes on where it was. Without `--only` every question; the table is of what the record has. Planning is told in processor
seconds, of all its processes together, so that what else the machine does is none of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = ("llama3-8b", "qwen2.5-32b", "llama3.1-70b", "llama3.1-405b")
LENGTHS = (8192, 32768, 131072, 524288, 1048576)
ACCELERATORS = (64, 256, 1024)
MACHINES = {"h100": "infiniband", "h20": "ethernet", "a100": "ethernet"}
PER_NODE, BATCH_TOKENS = 8, 2**22


def questions() -> list[dict[str, Any]]:
    """The usual machine first, small ones first."""
    return [
        {"model": model, "length": length, "accelerators": count, "hardware": hardware}
        for hardware, count, length, model in itertools.product(MACHINES, ACCELERATORS, LENGTHS, MODELS)
    ]


def batch(question: dict[str, Any]) -> int:
    return max(BATCH_TOKENS // question["length"], question["accelerators"] // PER_NODE)


def ask(question: dict[str, Any], limit_s: float, processes: int) -> dict[str, Any]:
    words = [
        "plan", "--model", question["model"], "--sequence-length", str(question["length"]), "--accelerators",
        str(question["accelerators"]), "--per-node", str(PER_NODE), "--hardware", question["hardware"], "--link",
        MACHINES[question["hardware"]], "--batch", str(batch(question)), "--processes", str(processes), "--json",
    ]  # fmt: skip
    begun = processor_s()
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "helixpipe", *words], capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return question | {"taken_s": limit_s, "says": f"no answer in {limit_s:.0f} s"}
    taken = round(processor_s() - begun, 1)
    if ran.returncode:
        return question | {"taken_s": taken, "says": ran.stderr.strip().splitlines()[-1]}
    found = json.loads(ran.stdout)
    return question | {"taken_s": taken, "rows": found["rows"][:2], "best": found["best"]}


def processor_s() -> float:
    """Of all processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def told(row: dict[str, Any]) -> str:
    """A row of a plan in words."""
    mesh = " x ".join(f"{name} {size}" for name, size in row["mesh"].items() if size > 1)
    words = [mesh, *([row["context_method"]] if row["mesh"].get("cp", 1) > 1 else [])]
    words.append("no pipeline" if row["family"] is None else row["family"])
    words += [f"{name} {value}" for name, value in row["options"].items()]
    return ", ".join([*words, f"recompute {row['recompute']}"])


def table(records: list[dict[str, Any]]) -> str:
    lines = [
        "| model | tokens | accelerators | batch | step, s | tokens/s each | of the peak | GiB | the best | the next | over | planning, processor s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in records:
        head = f"| {each['model']} | {each['length']:,} | {each['accelerators']} {each['hardware']} | {batch(each)} |"
        if "says" in each:
            lines.append(f"{head} | | | | {each['says']} | | | {each['taken_s']} |")
            continue
        first, *others = each["rows"]
        after = f"{told(others[0])} | {others[0]['step_s'] / first['step_s']:.3f}" if others else "|"
        lines.append(
            f"{head} {first['step_s']:.2f} | {first['tokens_per_s_per_accelerator']:,.0f} | "
            f"{each['best']['model_flops_utilisation']:.1%} | {first['peak_bytes'] / 2**30:.1f} | {told(first)} | {after} | {each['taken_s']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="a line of JSON a question")
    parser.add_argument("--only", default="", help="words that are all in a question, as 'llama3-8b h100 64'")
    parser.add_argument("--minutes", type=float, default=0.0, help="ask nothing more after so many; 0: all")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that one answer may take")
    parser.add_argument("--processes", type=int, default=0, help="that plan; 0: one a core")
    args = parser.parse_args()
    known = [json.loads(line) for line in args.record.read_text().splitlines()] if args.record.exists() else []
    keys = ("model", "length", "accelerators", "hardware")
    done = {tuple(each[key] for key in keys) for each in known}
    begun = time.monotonic()
    for question in questions():
        words = {str(value) for value in question.values()}
        if tuple(question.values()) in done or not set(args.only.split()) <= words:
            continue
        if args.minutes and time.monotonic() - begun > 60 * args.minutes:
            break
        known.append(ask(question, args.limit, args.processes))
        with args.record.open("a") as file:
            file.write(json.dumps(known[-1]) + "\n")
        print(f"{question}: {known[-1]['taken_s']} s", file=sys.stderr, flush=True)
    order = [tuple(question.values()) for question in questions()]
    print(table(sorted(known, key=lambda each: order.index(tuple(each[key] for key in keys)))))


if __name__ == "__main__":
    main()
