"""What a user asks of `helixpipe prepare`, as far as it decides what is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Fields of a record and bounds of a document. Either `text`, or `prompt` and `completion`, or `messages` is read."""

    text: str = "text"
    """The field with a document's text."""
    prompt: str = ""
    """The field with the part that does not count; "" where there is none."""
    completion: str = ""
    """The field with the part that counts."""
    messages: str = ""
    """The field with a conversation, which goes through the tokenizer's chat template; only assistant turns count."""
    split_lines: bool = False
    """Every line of a plain text file is a document; otherwise the file is one."""
    min_tokens: int = 1
    """Shorter documents are left out; tokens that the tokenizer adds are not counted."""
    max_tokens: int | None = None
    """Longer documents are left out."""

    def fields(self) -> tuple[str, ...]:
        """The names of the fields that are read."""
        if self.messages:
            return (self.messages,)
        return (self.prompt, self.completion) if self.prompt else (self.text,)
