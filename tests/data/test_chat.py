"""Conversations: rendered as transformers renders them, and only what the assistant wrote counts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import transformers
from making import PLANES, byte_level, documents, prepare, write_lines, write_tokenizer
from tokenizers import pre_tokenizers, processors

from helixpipe.cli import main

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
    {%- generation %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endgeneration %}
    {{- '\\n' }}
{%- else %}
    {{- message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
WITHOUT = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
# a turn's end is the assistant's too, where the template puts it into the generation
WIDE = CHATML.replace(
    "    {%- endgeneration %}\n    {{- '\\n' }}\n", "        {{- '\\n' }}\n    {%- endgeneration %}\n"
)


def chat(*turns: str) -> list[dict[str, str]]:
    """Turns of user and assistant by turns; `system: ...` first."""
    found, roles = [], ["user", "assistant"]
    for turn in turns:
        if turn.startswith("system: "):
            found.append({"role": "system", "content": turn.removeprefix("system: ")})
        else:
            found.append({"role": roles[0], "content": turn})
            roles.reverse()
    return found


CHATS = [
    chat("What is 1 + 2?", "3"),
    chat("system: Be brief.", "Hello", "Hi.", "And then?", "  leading spaces\n\nand lines\n", "last is the user's"),
    chat("é 日本", "😀 yes 日本語", PLANES, PLANES),
    [*chat("first"), {"role": "tool", "content": "4"}, {"role": "assistant", "content": ""}, *chat("x", "y")],
    chat("<|im_start|> said by the user", "and by the assistant <|im_end|> <|end|>"),
]


def library(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


def test_masks_are_transformers_own_where_the_template_says_what_is_generated(tmp_path: Path) -> None:
    for number, template in enumerate((CHATML, WIDE)):
        folder = write_tokenizer(tmp_path / f"tokenizer{number}", template=template)
        file = write_lines(tmp_path / "a.jsonl", [{"m": each} for each in CHATS])
        found = prepare(tmp_path / f"out{number}", folder, file, "--messages", "m")
        for i, messages in enumerate(CHATS):
            wanted = library(folder).apply_chat_template(
                messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
            )
            assert found.tokens(i).tolist() == wanted["input_ids"]
            assert found.mask(i).tolist() == [bool(each) for each in wanted["assistant_masks"]]
        assert found.manifest["counted"] < found.manifest["tokens"]


def test_turns_are_compared_where_the_template_does_not_say(tmp_path: Path) -> None:
    """The same conversations by both kinds of template: what is after the prompt for a turn is the assistant's."""
    said, compared = (write_tokenizer(tmp_path / name, template=each) for name, each in (("a", WIDE), ("b", WITHOUT)))
    file = write_lines(tmp_path / "a.jsonl", [{"m": each} for each in CHATS])
    one, other = (prepare(tmp_path / f"out-{each.name}", each, file, "--messages", "m") for each in (said, compared))
    assert documents(one) == documents(other)
    assert [one.mask(i).tolist() for i in range(len(CHATS))] == [other.mask(i).tolist() for i in range(len(CHATS))]


def test_a_last_letter_of_several_tokens_counts_whole(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}"
    folder = write_tokenizer(tmp_path / "tokenizer", template=template)
    messages = [{"role": "assistant", "content": "a\U000fbcde"}]
    found = prepare(tmp_path / "out", folder, write_lines(tmp_path / "a.jsonl", [{"m": messages}]), "--messages", "m")
    assert found.mask(0).tolist() == [True] * 5 + [False]
    theirs = library(folder).apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert theirs["input_ids"] == found.tokens(0).tolist()
    assert theirs["assistant_masks"] == [1, 1, 1, 1, 1, 0]


def test_trimmed_offsets_take_nothing_from_the_mask(tmp_path: Path) -> None:
    """A post-processor that trims offsets makes blanks belong to no letter: they count all the same."""
    made = byte_level()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    plain = byte_level()
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}{% endif %}{% endfor %}"
    folder = write_tokenizer(tmp_path / "tokenizer", made, template=template)
    file = write_lines(tmp_path / "a.jsonl", [{"m": chat("ask", "   tell   ")}])
    found = prepare(tmp_path / "out", folder, file, "--messages", "m")
    assert documents(found) == [plain.encode("ask   tell   ").ids]
    before = len(plain.encode("ask").ids)
    assert found.mask(0).tolist() == [False] * before + [True] * (len(found.tokens(0)) - before)


def test_templates_have_what_transformers_gives_them(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for message in messages %}{% if loop.index0 == 9 %}{% break %}{% endif %}"
        "{% if message.name is defined %}{{ message.name }}{% endif %}{{ message | tojson }}{{ message.content | trim }}"
        "{% endfor %}{% generation %}said{% endgeneration %}{{ strftime_now('%Y') }}{% if tools is none %}none{% endif %}{{ eos_token }}"
    )
    folder = write_tokenizer(tmp_path / "tokenizer", template=template, bos_token="<|im_start|>")
    rows = [
        [{"role": "user", "content": "  <b>é</b> ", "name": "Ann"}],
        [{"role": "user", "content": "x", "name": None}],
    ]
    pyarrow.parquet.write_table(pyarrow.table({"m": rows, "n": [1, 2]}), tmp_path / "a.parquet")
    found = prepare(tmp_path / "out", folder, tmp_path / "a.parquet", "--messages", "m")
    wanted = [library(folder).apply_chat_template(each, tokenize=True, return_dict=True)["input_ids"] for each in rows]
    assert documents(found) == wanted


def test_an_end_token_comes_after_a_conversation_when_asked(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", template=CHATML)
    file = write_lines(tmp_path / "a.jsonl", [{"m": CHATS[0]}])
    plain = prepare(tmp_path / "plain", folder, file, "--messages", "m")
    ended = prepare(tmp_path / "ended", folder, file, "--messages", "m", "--end-token", "<|end|>")
    assert ended.tokens(0).tolist() == [*plain.tokens(0).tolist(), byte_level().token_to_id("<|end|>")]
    assert ended.mask(0).tolist() == [*plain.mask(0).tolist(), True]


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, template: str, messages: object, *more: str) -> str:
    folder = write_tokenizer(tmp_path / "tokenizer", template=template)
    file = write_lines(tmp_path / "a.jsonl", [{"m": messages}])
    given = ["prepare", str(file), "--tokenizer", str(folder), "--output", str(tmp_path / "out"), "--messages", "m"]
    assert main([*given, "--workers", "1", *more]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    return (
        told.removeprefix("helixpipe: error: ")
        .removeprefix(f"{file}:1: ")
        .removesuffix(" (--on-error skip leaves such out)")
    )


NOTHING = "nothing of it would count: the assistant writes nothing in it (roles: {}); rename roles, or leave it out"
UNTOLD = "--messages: with this chat template it cannot be told what the assistant wrote, since turn 2 "


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for m in messages %}{% if loop.last %}<think>{% endif %}{{ m.content }}{% endfor %}",
            "does not go on from what asks for it (add_generation_prompt)",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% if loop.last and m.role == 'assistant' %}END{% endif %}{% endfor %}",
            "is rendered otherwise when turns follow it",
        ),
        (
            "{% if messages[-1].role == 'assistant' %}{{ raise_exception('ends so') }}{% endif %}",
            "cannot be rendered without the turns after it: the chat template refuses it: ends so",
        ),
    ],
)
def test_a_template_that_does_not_tell_is_refused(
    tmp_path: Path, template: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the template's fault and not the line's, so it is not left out."""
    assert refused(capsys, tmp_path, template, chat("a", "b", "c"), "--on-error", "skip") == UNTOLD + why


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ("text", "field 'm' is text, not a list of messages"),
        ([], "field 'm' is an empty list, not a list of messages"),
        (None, "field 'm' is null, not a list of messages"),
        ([{"content": "x"}], "field 'm' has a message without a role: an object"),
        (["x"], "field 'm' has a message without a role: text"),
        ([{"role": "user", "content": "\ud800"}], "a message has a lone surrogate, which is no character"),
        ([{"role": "user"}], "the chat template refuses it: 'dict object' has no attribute 'content'"),
        (chat("only a question"), NOTHING.format("'user'")),
        (
            [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}, {"role": "gpt", "content": "c"}],
            NOTHING.format("'human', 'gpt'"),
        ),
    ],
)
def test_conversations_that_cannot_be_read(
    tmp_path: Path, messages: object, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, tmp_path, CHATML, messages) == why


def test_a_turn_that_the_template_leaves_out_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Many templates pass over roles that they do not know, and what was said is gone without a word."""
    template = "{% for m in messages if m.role in ('system', 'user', 'assistant') %}{{ m.content }}|{% endfor %}"
    messages = [
        *chat("system: s", "ask"),
        {"role": "observation", "content": "seen"},
        {"role": "assistant", "content": "t"},
    ]
    assert refused(capsys, tmp_path, template, messages) == (
        "the chat template leaves turn 3 out, of role 'observation'; rename its role, or remove it"
    )
    shutil.rmtree(tmp_path / "out")
    strict = template.replace(
        "{% for", "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{% for"
    )
    messages[2]["role"] = "user"
    assert refused(capsys, tmp_path, strict, messages, "--max-tokens", "1").startswith("no document is left")


def test_a_name_twice_in_a_message_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = write_tokenizer(tmp_path / "tokenizer", template=CHATML), tmp_path / "a.jsonl"
    file.write_text('{"m": [{"role": "user", "content": "a", "role": "assistant"}]}\n')
    given = ["prepare", str(file), "--tokenizer", str(folder), "--output", str(tmp_path / "out"), "--messages", "m"]
    assert main([*given, "--workers", "1"]) == 2
    assert f"{file}:1: field 'm' has a message with 'role' more than once; leave one of them" in capsys.readouterr().err


def test_a_template_that_is_no_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, tmp_path, "{% for %}", []).startswith(
        "--messages: the chat template is not Jinja that can be run: "
    )
    told = refused(capsys, tmp_path, "{{ messages.__class__.__mro__ }}", chat("a"))
    assert told.startswith("the chat template refuses it: access to attribute '__class__' of 'list' object is unsafe")
    assert not os.path.exists(tmp_path / "out/manifest.json")


def test_alphabets_of_the_tests_are_whole() -> None:
    assert len(pre_tokenizers.ByteLevel.alphabet()) == 256
