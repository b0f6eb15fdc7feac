"""`helixpipe export RUN FOLDER`"""

from __future__ import annotations

import dataclasses

from helixpipe.files import json_text
from helixpipe.flags import Parser

ABOUT = """\
A run's newest checkpoint as a Hugging Face folder: config.json and safetensors, which transformers loads; of a run with
train.lora as a folder of adapters, which PEFT loads."""
EPILOG = """\
The folder is written whole or not at all, on this machine alone, and a tensor at a time is in memory. A run that came from a
folder (--model.path) keeps its config but for what the run changed, and its generation config and tokenizer go along.
"""


def export(given: list[str]) -> int:
    """`helixpipe export RUN FOLDER [options]`"""
    parser = Parser("export", "RUN FOLDER [options]", ABOUT, EPILOG)
    parser.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoints")
    parser.add_argument("folder", metavar="FOLDER", help="the folder to make; its name must be free")
    parser.add_argument(
        "--dtype", metavar="D", help="bfloat16, float16, float32 or float64 [that of the run's folder, or its own]"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file: 5GB, 500MB, 2GiB [5GB]")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="of a run with train.lora: add adapters to the weights, and write the whole model",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.read(given)
    from helixpipe.train.export import export as write  # which brings torch in

    found = write(args.run, args.folder, args.dtype, args.max_shard_size, args.merge)
    if args.json:
        print(json_text(dataclasses.asdict(found), default=str))
        return 0
    what = f"adapters of {found.architecture}" if found.adapter else found.architecture
    files = f"{found.files} files" if found.files > 1 else "one file"
    print(
        f"{found.folder}: {what}, {found.parameters:,} parameters in {found.dtype}, {files}; "
        f"from {found.checkpoint}, step {found.step}"
    )
    return 0
