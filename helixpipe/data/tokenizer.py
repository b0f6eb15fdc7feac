"""Tokenizers: read from a folder or a file, carried along with the data, and asked for a document's tokens."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from helixpipe.data.chat import ChatTemplate
from helixpipe.data.extras import needed
from helixpipe.data.options import Options
from helixpipe.data.records import Content
from helixpipe.errors import ConfigError, DataError
from helixpipe.files import fault

FILE = "tokenizer.json"
# what a folder with a tokenizer has of it, beside the file
_BESIDE = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip


class Source(NamedTuple):
    """A tokenizer as it was given: the bytes of its files by name, FILE among them."""

    name: str
    files: dict[str, bytes]

    def digest(self) -> str:
        """Of all its files: the chat template and the special tokens decide what is written too."""
        found = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            found.update(f"{name} {len(content)}\n".encode() + content)
        return "sha256:" + found.hexdigest()


class Encoded(NamedTuple):
    """A document's tokens. `counted`: which of them count as targets, None for all; `own`: how many are not added ones."""

    ids: NDArray[np.uint32]
    counted: NDArray[np.bool_] | None
    own: int


def read_source(given: str) -> Source:
    """The files of a tokenizer, from its folder or a tokenizer.json. Raises ConfigError."""
    path = Path(given)
    if why := fault(path):
        raise ConfigError(f"--tokenizer: '{path}' cannot be read: {why}")
    if path.is_file():
        return Source(given, {FILE: _read(path)})
    if not path.is_dir():
        if os.path.lexists(path):
            raise ConfigError(
                f"--tokenizer: '{path}' is neither a file nor a folder; give a folder with {FILE}, or that file"
            )
        raise ConfigError(f"--tokenizer: '{path}' does not exist; give a folder with {FILE}, or that file")
    odd = next(
        (path / name for name in (FILE, *_BESIDE) if os.path.lexists(path / name) and not (path / name).is_file()), None
    )
    if odd is not None:  # a pipe would be waited for
        raise ConfigError(f"--tokenizer: '{odd}' is no file, or a link to nowhere; get it anew")
    files = {name: _read(path / name) for name in _BESIDE if (path / name).is_file()}
    file = path / FILE
    return Source(given, files | {FILE: _read(file) if file.is_file() else _converted(path)})


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--tokenizer: '{path}' cannot be read: {error.strerror}") from None


def _converted(folder: Path) -> bytes:
    """The tokenizer.json that transformers makes of a folder without one."""
    transformers = needed("transformers", f"--tokenizer: '{folder}' has no {FILE}, and to make it")
    try:
        found = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a folder makes transformers raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--tokenizer: '{folder}' has no {FILE}, and transformers cannot read it: {why}") from None
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"--tokenizer: '{folder}' is a {type(found).__name__}, which has no fast tokenizer; give one with a {FILE}"
        )
    text: str = backend.to_str()
    return text.encode()


def end_token(source: Source, asked: str | None) -> int | None:
    """The id of the token after each document: as asked ("none" is none), or the one that the tokenizer's files name."""
    ids = _vocabulary(_load(source))
    if asked is not None:
        if asked == "none":
            return None
        if asked not in ids and asked.isascii() and asked.isdigit() and int(asked) in ids.values():
            return int(asked)
        if asked not in ids:
            raise ConfigError(f"--end-token: '{asked}' is not a token of the tokenizer; give one, its id, or none")
        return ids[asked]
    named = special_tokens(source).get("eos_token")
    if named in ids:
        return ids[named]
    found = _settings(source, "generation_config.json").get("eos_token_id")
    found = found[0] if isinstance(found, list) and found else found
    if isinstance(found, int) and found in ids.values():
        return found
    special = (
        ", ".join(f"'{name}'" for name in sorted(_special(source), key=lambda name: ids.get(name, 0))[:6]) or "none"
    )
    raise ConfigError(
        f"--end-token: '{source.name}' does not say which token ends a document; give one (its special ones: {special}), or none"
    )


def special_tokens(source: Source) -> dict[str, str]:
    """Names as templates use them, such as bos_token, and their tokens."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, value in _settings(source, file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
    return found


def chat_template(source: Source) -> str:
    """The Jinja text of the tokenizer's chat template; raises ConfigError where it has none."""
    if "chat_template.jinja" in source.files:
        return source.files["chat_template.jinja"].decode("utf-8", "replace")
    for file in ("chat_template.json", "tokenizer_config.json"):
        found = _settings(source, file).get("chat_template")
        if isinstance(found, list):  # named ones
            found = next((each.get("template") for each in found if each.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    raise ConfigError(f"--messages: the tokenizer '{source.name}' has no chat template; give a folder with one")


def _settings(source: Source, file: str) -> dict[str, Any]:
    if file not in source.files:
        return {}
    try:
        found = json.loads(source.files[file])
    except (ValueError, RecursionError):
        raise ConfigError(f"--tokenizer: {file} of '{source.name}' is not JSON; get it anew") from None
    return found if isinstance(found, dict) else {}


def _special(source: Source) -> list[str]:
    added = json.loads(source.files[FILE]).get("added_tokens") or []
    return [each["content"] for each in added if each.get("special")]


def _load(source: Source, exact_offsets: bool = False) -> Any:
    """The library's tokenizer, which neither cuts nor pads. Some post-processors trim offsets, and are then left out."""
    # workers are processes; threads of the library's own would only fight over the cores
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizers = needed("tokenizers", "prepare")
    try:
        text = source.files[FILE].decode("utf-8")
        if exact_offsets:
            text = json.dumps(json.loads(text) | {"post_processor": None})
        found = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library's own have no class
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--tokenizer: '{source.name}' is not a {FILE}: {why}") from None
    found.no_truncation()
    found.no_padding()
    return found


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    found: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return found


class Tokenizer:
    """Documents to tokens. `vocabulary` is one more than the largest id that the tokenizer lists."""

    def __init__(self, source: Source, options: Options, end: int | None, today: date) -> None:
        self.end = end
        self._library = _load(source, exact_offsets=bool(options.messages))
        self.vocabulary = max(_vocabulary(self._library).values(), default=-1) + 1
        self._chat = ChatTemplate(chat_template(source), special_tokens(source), today) if options.messages else None
        self._before, self._after = ([], []) if options.messages else self._added()

    def encode(self, contents: Sequence[Content]) -> list[Encoded | str]:
        """The tokens of each document, or why it has none (the tokenizer or its template cannot do it).

        Raises DataError where the tokenizer gives an id that it does not list.
        """
        if self._chat is not None:
            return [self._conversation(content) for content in contents]  # type: ignore[arg-type]
        if contents and len(contents[0]) == 2:
            return [self._completion(*content) for content in contents]
        added = len(self._before) + len(self._after)
        return [
            ids if isinstance(ids, str) else Encoded(self._ended(ids), None, len(ids) - added)
            for ids in self._batch([content[0] for content in contents], True)  # type: ignore[misc]
        ]

    def _completion(self, prompt: str, completion: str) -> Encoded | str:
        """Prompt and completion are tokenised one by one, as a model that is asked reads the one and writes the other."""
        before, after = self._batch([prompt, completion], False)
        if isinstance(before, str) or isinstance(after, str):
            return before if isinstance(before, str) else str(after)
        ids = self._ended(np.concatenate([self._before, before, after, self._after]).astype(np.uint32))
        return Encoded(ids, np.arange(len(ids)) >= len(self._before) + len(before), len(before) + len(after))

    def _conversation(self, messages: list[dict[str, Any]]) -> Encoded | str:
        assert self._chat is not None
        try:
            text, spans = self._chat.render(messages)
        except ValueError as error:
            return str(error)
        try:
            found = self._library.encode(text, add_special_tokens=False)
        except Exception as error:
            return f"the tokenizer fails: {error}"
        ids, counted = self._checked(found.ids), np.zeros(len(found.ids), bool)
        begins, ends = np.array(found.offsets, np.int64).reshape(-1, 2).T
        for begin, end in spans:  # a token counts where any letter of it is the assistant's
            counted |= (begins < end) & (ends > begin)
        if not counted.any():
            roles = ", ".join(f"'{role}'" for role in dict.fromkeys(message["role"] for message in messages))
            return f"nothing of it would count: the assistant writes nothing in it (roles: {roles}); rename roles, or leave it out"
        ended = self._ended(ids)
        return Encoded(ended, np.concatenate([counted, np.ones(len(ended) - len(ids), bool)]), len(ids))

    def _batch(self, texts: list[str], with_added: bool) -> list[NDArray[np.uint32] | str]:
        try:
            found = self._library.encode_batch_fast(texts, add_special_tokens=with_added)
        except Exception as error:
            if len(texts) == 1:
                return [f"the tokenizer fails: {error}"]
            return [ids for text in texts for ids in self._batch([text], with_added)]
        return [self._checked(each.ids) for each in found]

    def _checked(self, ids: list[int]) -> NDArray[np.uint32]:
        found = np.frombuffer(array("I", ids), np.uint32)  # a third of the time of np.array
        if len(found) and found.max() >= self.vocabulary:
            raise DataError(
                f"--tokenizer: it gives token {found.max()}, and its vocabulary ends at {self.vocabulary - 1}; "
                "its post-processor or an added token is not of this vocabulary"
            )
        return found

    def _ended(self, ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """With the end token, which some tokenizers add by themselves."""
        if self.end is None or (len(ids) and ids[-1] == self.end):
            return ids
        return np.append(ids, np.uint32(self.end))

    def _added(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and after a text."""
        for text in ("a", " ", "0"):  # a tokenizer need not know every letter
            plain, full = (self._batch([text], added)[0] for added in (False, True))
            if isinstance(plain, str) or isinstance(full, str) or not len(plain):
                continue
            for at in range(len(full) - len(plain) + 1):
                if (full[at : at + len(plain)] == plain).all():
                    return full[:at].tolist(), full[at + len(plain) :].tolist()
        return [], []
