"""Masks of drawn conversations are transformers' own, whatever the tokenizer does to its text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from making import PLANES, SPECIAL, WORDS, byte_level, prepare, write_lines, write_tokenizer
from test_chat import CHATML, WITHOUT
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

# as Llama 3 writes turns: a first token, the day, the system's turn apart, tools where there are any
HEADERS = """\
{{- bos_token }}
{%- if tools is not none %}{{- raise_exception('tools') }}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|im_start|>system\\n\\nToday: ' + strftime_now('%d %b %Y') + '\\n' + system + '<|im_end|>' }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles alternate') }}{%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n\\n' }}
    {%- if message['role'] == 'assistant' %}{%- generation %}{{- message['content'] | trim + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}{{- message['content'] | trim + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}
"""


def words_of_pieces() -> tokenizers.Tokenizer:
    """As SentencePiece has them: blanks are a letter of their own, and letters that it lacks are bytes."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Metaspace()
    every = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *SPECIAL, *every], show_progress=False, limit_alphabet=60
    )
    made.train_from_iterator([WORDS] * 4, trainer)
    return made


def lower_case_words() -> tokenizers.Tokenizer:
    """As BERT has them: letters lose their case and accents, and some letters are gone."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        [WORDS] * 4,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False),
    )
    return made


def drawn(draw: random.Random) -> list[dict[str, str]]:
    def text() -> str:
        pieces = draw.choices(
            [WORDS[:30], " ", "\n", "é", "日本", "😀", "\t x", PLANES[7:11], "İ", "ﬁ", "e\u0301"],
            k=draw.randrange(1, 9),
        )
        return "".join(pieces)

    turns = [{"role": role, "content": text()} for _ in range(draw.randrange(1, 4)) for role in ("user", "assistant")]
    return [*([{"role": "system", "content": text()}] if draw.random() < 0.5 else []), *turns]


@pytest.mark.parametrize("made", [byte_level, words_of_pieces, lower_case_words])
@pytest.mark.parametrize("template", [CHATML, HEADERS], ids=["chatml", "headers"])
def test_tokens_and_masks_are_transformers_own(tmp_path: Path, made: Any, template: str) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", made(), template=template, bos_token="<|im_start|>")
    draw = random.Random(0)
    chats = [drawn(draw) for _ in range(40)]
    found = prepare(
        tmp_path / "out", folder, write_lines(tmp_path / "a.jsonl", [{"m": each} for each in chats]), "--messages", "m"
    )
    library = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    for number, messages in enumerate(chats):
        wanted = library.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )
        assert found.tokens(number).tolist() == wanted["input_ids"]
        assert found.mask(number).tolist() == [bool(each) for each in wanted["assistant_masks"]]


def test_without_marks_a_turn_s_line_end_counts_beside_what_the_marks_say(tmp_path: Path) -> None:
    """The two templates differ by `{% generation %}` alone: turn by turn, the line's end after a turn is the turn's too."""
    draw = random.Random(1)
    file = write_lines(tmp_path / "a.jsonl", [{"m": drawn(draw)} for _ in range(30)])
    found = [
        prepare(
            tmp_path / f"out{at}", write_tokenizer(tmp_path / f"tokenizer{at}", template=each), file, "--messages", "m"
        )
        for at, each in enumerate((CHATML, WITHOUT))
    ]
    line_end = byte_level().encode("\n").ids
    for number in range(30):
        marked, compared = (each.mask(number) for each in found)
        tokens = found[1].tokens(number)
        assert tokens.tolist() == found[0].tokens(number).tolist()
        assert set(tokens[compared & ~marked].tolist()) == set(line_end)
        assert not (marked & ~compared).any()
