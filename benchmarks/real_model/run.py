"""A real model, whole: loss, loading, training on at four times its length, export. `python benchmarks/real_model/run.py FOLDER`

FOLDER is what `make_folder.py` writes. Each part can be run alone: --only loss,loading,training
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import helixpipe as hp

HERE = Path(__file__).parent
CHARACTERS = 6000
CONTENDERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "1f1b, p=2": ("1f1b", 2, {}),
    "seq1f1b, p=2, k=4": ("seq1f1b", 2, {"segments": 4}),
    "helix two-fold, p=2": ("helix", 4, {"folds": 2, "travel": "qkv"}),
}


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def sample(folder: Path) -> Tensor:
    """[1, 1975]: the first characters of the standard library's os.py."""
    text = Path(os.__file__).read_text()[:CHARACTERS]
    tokens: Tensor = tokenizer_of(folder)(text, return_tensors="pt").input_ids
    return tokens


def theirs(folder: Path, tokens: Tensor) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss)


def ours(folder: Path, tokens: Tensor, family: str, microbatches: int, options: dict[str, Any]) -> float:
    """The loss on a rank: the same sequence in every micro-batch."""
    model = hp.load(folder)
    schedule = hp.build_schedule(family, ranks=2, layers=model.shape.layers, microbatches=microbatches, **options)
    pipeline = hp.Pipeline(model, schedule)
    tokens = tokens.expand(microbatches, -1)
    try:
        return pipeline.evaluate(tokens[:, :-1], tokens[:, 1:])
    finally:
        pipeline.close()


def losses(folder: Path) -> None:
    tokens = sample(folder)
    expected = theirs(folder, tokens)
    print(f"loss of {tokens.shape[1]} tokens, nats a token: transformers {expected:.6f}")
    for name, (family, microbatches, options) in CONTENDERS.items():
        found = hp.launch(ours, folder, tokens, family, microbatches, options, ranks=2)
        print(f"  {name}: {found:.6f}, {found - expected:+.1e}")


def peak_of(code: str, folder: Path) -> tuple[float, float]:
    """Seconds and MiB of resident set, beyond what stood before, of a statement in a process of its own."""
    script = (
        "import sys, time, torch, helixpipe.hub.load, transformers\n"
        "from transformers import LlamaForCausalLM\nfrom helixpipe.parts.part import chain\nimport helixpipe as hp\n"
        "torch.set_num_threads(1)\nfolder = sys.argv[1]\n"
        "def status(key):\n"
        "    line = next(x for x in open('/proc/self/status') if x.startswith(key)); return int(line.split()[1]) / 1024\n"
        "open('/proc/self/clear_refs', 'w').write('5')\nbefore, begun = status('VmRSS'), time.perf_counter()\n"
        f"{code}\n"
        "print(time.perf_counter() - begun, status('VmHWM') - before)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, str(folder)], check=True, capture_output=True, text=True, timeout=600
    ).stdout
    seconds, mib = map(float, said.split())
    return seconds, mib


def loading(folder: Path) -> None:
    held = "kept = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)"
    all_parts = "model = hp.load(folder); kept = [model.part(p) for p in chain(model.shape.layers)]"
    half = (
        "model = hp.load(folder); n = model.shape.layers\nkept = [model.part(p) for p in chain(n) if p.layer < n // 2]"
    )
    read = "kept = [sum(len(open(f, 'rb').read()) for f in __import__('pathlib').Path(folder).glob('*.safetensors'))]"
    rows = {"the bytes alone": read, "transformers": held, "ours, all": all_parts, "ours, the first of 2 ranks": half}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(5):
        for name, code in rows.items():
            found[name].append(peak_of(code, folder))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
    print(f"loading {size:.0f} MiB, medians of 5: seconds, MiB of resident set beyond what stood before")
    for name, pairs in found.items():
        seconds, mib = (float(np.median([pair[i] for pair in pairs])) for i in (0, 1))
        print(f"  {name}: {seconds:.2f} s, {mib:.0f} MiB")


def tokens_of_library(folder: Path, out: Path) -> None:
    """The standard library's source as the model's tokens, one file after another."""
    tokenizer = tokenizer_of(folder)
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        ids += [*tokenizer(path.read_text(encoding="utf-8", errors="replace")).input_ids, end]
    np.save(out, np.array(ids, dtype=np.uint16))


def command(*words: str, **options: Any) -> str:
    shown = ["helixpipe", *words]
    print("$", " ".join(shown), flush=True)
    return subprocess.run([sys.executable, "-m", *shown], check=True, text=True, **options).stdout


def told(name: str, found: dict[str, Any]) -> None:
    positions = ", ".join(f"{each['first']}: {each['loss']:.3f}" for each in found["by_position"] if each["loss"])
    print(f"{name}: {found['loss']:.4f}; by position {positions}", flush=True)


def training(folder: Path, work: Path, steps: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    data = work / "tokens.npy"
    if not data.exists():
        tokens_of_library(folder, data)
    run, exported = work / "run", work / "exported"
    common = [str(HERE / "train.toml"), "--model.path", str(folder), "--data.path", str(data)]
    evaluate = ["evaluate", *common, "--json"]
    told("before", json.loads(command(*evaluate, stdout=subprocess.PIPE)))
    begun = time.perf_counter()
    command("train", *common, "--run.folder", str(run), "--train.steps", str(steps))
    print(f"{steps} steps in {time.perf_counter() - begun:.0f} s")
    after = json.loads(command("evaluate", "--resume", str(run), "--json", stdout=subprocess.PIPE))
    told("after", after)
    command("export", str(run), str(exported))
    check_export(exported, data)


def check_export(exported: Path, data: Path) -> None:
    """transformers loads what was trained, gives our loss on a window, and goes on with a line."""
    from transformers import AutoModelForCausalLM

    window = torch.from_numpy(np.load(data, mmap_mode="r")[-4097:].astype(np.int64)).unsqueeze(0)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        logits = model(window[:, :-1]).logits.flatten(0, 1)
    expected = float(torch.nn.functional.cross_entropy(logits, window[:, 1:].flatten()))
    found = hp.launch(ours, exported, window, *CONTENDERS["1f1b, p=2"], ranks=2)
    print(f"the exported model on the last 4096 tokens: transformers {expected:.6f}, ours {found:.6f}")
    assert math.isclose(found, expected, abs_tol=1e-4)
    tokenizer = tokenizer_of(exported)
    prompt = tokenizer('def read_lines(path):\n    """Return the lines of a file."""\n', return_tensors="pt")
    line = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(line[0], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="loss,loading,training")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("runs/real_model"))
    args = parser.parse_args()
    chosen = args.only.split(",")
    if "loss" in chosen:
        losses(args.folder)
    if "loading" in chosen:
        loading(args.folder)
    if "training" in chosen:
        training(args.folder, args.work, args.steps)


if __name__ == "__main__":
    main()
