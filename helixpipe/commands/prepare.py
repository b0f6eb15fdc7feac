"""`helixpipe prepare INPUT... --tokenizer FOLDER_OR_FILE --output FOLDER`"""

from __future__ import annotations

import os
import sys
import time

from helixpipe.errors import ConfigError
from helixpipe.files import json_text
from helixpipe.flags import Parser, number

MOST_WORKERS = 512


def prepare(given: list[str]) -> int:
    """Text, JSON lines, tables and datasets to a folder of tokens, which `data.path` reads."""
    parser = Parser(
        "prepare",
        "INPUT... --tokenizer FOLDER_OR_FILE --output FOLDER [options]",
        "Documents to tokens: a folder of memory-mapped shards, which helixpipe train reads as data.path.",
        "Inputs are text (UTF-8), .jsonl (also .gz and .zst), .parquet, a dataset saved to disk, or folders of them. "
        "A text file is one document. An interrupted command goes on when it is given again.",
    )
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", help="files and folders, read in this order, folders sorted"
    )
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="a folder with tokenizer.json, or that file")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new folder, or one to go on with")
    parser.add_argument("--text", metavar="FIELD", help="the field with a document's text [text]")
    parser.add_argument("--prompt", metavar="FIELD", help="the field that does not count, with --completion")
    parser.add_argument("--completion", metavar="FIELD", help="the field that counts, after --prompt's")
    chat = "the field with a conversation, for the tokenizer's chat template; only the assistant's turns count"
    parser.add_argument("--messages", metavar="FIELD", help=chat)
    parser.add_argument("--split-lines", action="store_true", help="each line of a text file is a document")
    end = "after each document: a token, its id, or none [what the tokenizer's files name; none after conversations]"
    parser.add_argument("--end-token", metavar="TOKEN", help=end)
    parser.add_argument("--min-tokens", type=number, default=1, metavar="N", help="leave shorter documents out [1]")
    parser.add_argument("--max-tokens", type=number, metavar="N", help="leave longer documents out")
    bad = "what a line that cannot be read does: stop, or skip (it is counted and named) [stop]"
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=bad)
    parser.add_argument(
        "--workers", type=number, metavar="N", help="processes; they change no byte of the output [cores]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.read(given)

    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    if not 0 < workers <= MOST_WORKERS:
        raise ConfigError(f"--workers: {workers}; give 1 to {MOST_WORKERS}")
    if args.min_tokens < 0:
        raise ConfigError(f"--min-tokens: {args.min_tokens}; give 0 or more")
    if args.max_tokens is not None and args.max_tokens < max(args.min_tokens, 1):
        raise ConfigError(f"--max-tokens: {args.max_tokens}; give at least 1, and no less than --min-tokens")
    if (args.prompt is None) != (args.completion is None):
        raise ConfigError(f"--{'prompt' if args.prompt is None else 'completion'}: missing; the two go together")
    asked = [name for name in ("text", "prompt", "messages") if getattr(args, name) is not None]
    if len(asked) > 1:
        raise ConfigError(f"--{asked[1]}: does not go with --{asked[0]}; give one of them")
    empty = next((name for name in ("text", "prompt", "completion", "messages") if getattr(args, name) == ""), None)
    if empty is not None:
        raise ConfigError(f"--{empty}: no field; name one")

    # numpy comes in here
    from helixpipe.data.options import Options
    from helixpipe.data.prepare import prepare as run

    options = Options(
        text=args.text or "text",
        prompt=args.prompt or "",
        completion=args.completion or "",
        messages=args.messages or "",
        split_lines=args.split_lines,
        min_tokens=args.min_tokens,
        max_tokens=args.max_tokens,
    )
    begin_s = time.monotonic()
    manifest = run(
        args.inputs, args.tokenizer, args.output, options, args.end_token, workers, stop_at_bad=args.on_error == "stop"
    )
    seconds = time.monotonic() - begin_s
    skipped = manifest["skipped"]
    if args.json:
        shown = {key: value for key, value in manifest.items() if key != "shards"}
        print(json_text({"folder": args.output, "seconds": round(seconds, 3)} | shown))
        return 0
    left_out = ", ".join(f"{skipped[kind]:,} {kind}" for kind in ("bad", "short", "long") if skipped[kind])
    print(
        f"{args.output}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, of which {manifest['counted']:,} "
        f"count; vocabulary {manifest['vocabulary']:,}" + (f"; left out: {left_out}" if left_out else "")
    )
    for name in skipped["no_files"]:
        print(f"not read: '{name}' is no file, or a link to a folder", file=sys.stderr)
    return 0
