"""Does a rank hold its share and no more while it loads? 4 ranks, a model of 1 GiB. `python benchmarks/real_model/load_memory.py`

Peak resident set of each rank, beyond what stood before (torch and its first use of everything included), over the bytes of its own
parameters in float32; and the seconds over those of reading the same bytes from the same files, which are in the page cache.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import helixpipe as hp

RANKS = 4


def write(folder: Path, dtype: str) -> None:
    """A Llama of 1 GiB in float32: 20 layers, 13.1M parameters each, and a table of 8192 words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=8,
        vocab_size=8192, tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="300MB")


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def pipeline_of(model: Any, family: str) -> hp.Pipeline:
    layers = model.shape.layers
    schedule = hp.build_schedule(family, ranks=RANKS, layers=layers, microbatches=RANKS * 2)
    return hp.Pipeline(model, schedule)


def load(folder: Path, family: str) -> list[list[float]]:
    """On a rank: its own bytes, its peak, seconds, seconds to read as many bytes; of all ranks."""
    tiny = hp.Decoder(hp.named_shape("tiny", layers=RANKS * 2, hidden=32, ffn=64))
    pipeline_of(tiny, family).close()  # what torch keeps of its first use of anything is no rank's share
    hp.load(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before, begun = resident("VmRSS"), time.perf_counter()
    pipeline = pipeline_of(hp.load(folder), family)
    took, peak = time.perf_counter() - begun, resident("VmHWM") - before
    mine = sum(p.numel() * p.element_size() for p in pipeline.parameters.values())
    wanted = sum(p.numel() for p in pipeline.parameters.values()) * (2 if "bfloat16" in folder.name else 4)
    begun = time.perf_counter()
    buffer = bytearray(2**24)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while wanted > 0 and (got := opened.readinto(buffer)):
                wanted -= got
    told = [float(mine), float(peak), took, time.perf_counter() - begun]
    pipeline.close()
    everyone: list[list[float]] = [told] * RANKS
    torch.distributed.all_gather_object(everyone, told)
    return everyone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        print("files, family, rank | share, MiB | peak over share | seconds | over reading the bytes")
        for dtype in ("float32", "bfloat16"):
            folder = work / dtype
            write(folder, dtype)
            for family in ("1f1b", "helix"):
                rounds = [hp.launch(load, folder, family, ranks=RANKS) for _ in range(args.rounds)]
                for rank in range(RANKS):
                    mine, peak, took, read = (statistics.median(each[rank][i] for each in rounds) for i in range(4))
                    print(
                        f"{dtype}, {family}, {rank} | {mine / 2**20:.0f} | {peak / mine:.3f} | {took:.2f} | {took / read:.1f}",
                        flush=True,
                    )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
