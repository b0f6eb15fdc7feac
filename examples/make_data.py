"""Small data to prepare, and a tokenizer for it: `python examples/make_data.py chat|text|code FOLDER`

chat: conversations of several turns about sums, and a chat template. text: the manual pages of Python's statements and types.
code: source of Python's standard library. Each becomes FOLDER/in.jsonl, for which FOLDER/tokenizer is a byte-level BPE.
"""

from __future__ import annotations

import json
import random
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = 1024
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
# what stands between generation and endgeneration is what the assistant writes
TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
    {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
    {{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def chat() -> list[dict[str, object]]:
    draw, found = random.Random(0), []
    for _ in range(2000):
        total = draw.randrange(50)
        turns = [("system", "You add up."), ("user", f"Begin with {total}."), ("assistant", f"That is {total}.")]
        for _ in range(draw.randrange(1, 5)):
            more = draw.randrange(50)
            total += more
            turns += [("user", f"Add {more}."), ("assistant", f"That is {total}.")]
        found.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return found


def text() -> list[dict[str, object]]:
    return [{"text": page} for page in topics.values()]


def code() -> list[dict[str, object]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [
        *sorted(library.glob("asyncio/*.py")),
        *sorted(library.glob("json/*.py")),
        *sorted(library.glob("email/*.py")),
    ]
    return [{"path": str(file.relative_to(library)), "content": file.read_text("utf-8")} for file in files]


def tokenizer(texts: Iterable[str], folder: Path) -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=WORDS, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    made = {"chat": chat, "text": text, "code": code}
    if len(sys.argv) != 3 or sys.argv[1] not in made:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True)
    records = made[sys.argv[1]]()
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer((json.dumps(record) for record in records[:200]), folder / "tokenizer")


if __name__ == "__main__":
    main()
