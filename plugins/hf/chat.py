"""Chat templates: a tokenizer's own form for a conversation around a prompt, and the token that ends a turn."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .tokenizer import HFTokenizer

__all__ = ["ChatTokenizer"]

ANSWER = "answer"


class ChatTokenizer(HFTokenizer):
    """A tokenizer that hands a prompt to the model as a user's message, in its own chat template.

    A response ends with the token that the template puts after an assistant's message, where that is a special
    one, and else with the tokenizer's end token.

    Raises ValueError for a tokenizer without a template, or with one that takes no plain conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if not isinstance(tokenizer.chat_template, str):
            several = ": it has several, by name" if tokenizer.chat_template else ""
            raise ValueError(
                f"chat_template = true, but the tokenizer {tokenizer.name_or_path!r} has no chat template of its "
                f"own{several}. Take the folder of a model that was tuned for chats, or set `tokenizer.chat_template` "
                "and save it again, or leave chat_template out"
            )
        self.end_id = self._end_of_turn()

    @classmethod
    def load(cls, folder: Path | str) -> ChatTokenizer:
        """As `HFTokenizer.load`."""
        return cls(HFTokenizer.load(folder).tokenizer)

    def as_prompt(self, text: str) -> str:
        """The conversation of this one message, up to where the assistant's answer begins. No message, no text."""
        return self._render([("user", text)], continues=True) if text else ""

    def _end_of_turn(self) -> int:
        """The special token that stands next after an assistant's message, or else the end token."""
        conversation = self._render([("user", "x"), ("assistant", ANSWER)], continues=False)
        _, answer, after = conversation.rpartition(ANSWER)
        if not answer:
            raise ValueError(
                f"chat_template = true, but the template of the tokenizer {self.tokenizer.name_or_path!r} leaves an "
                "assistant's message out: where a turn ends cannot be seen. Set a template that renders it"
            )
        next_token = self.encode([after.lstrip()])[0][:1]
        added = self.tokenizer.added_tokens_decoder
        return next_token[0] if next_token and next_token[0] in added and added[next_token[0]].special else self.end_id

    def _render(self, messages: list[tuple[str, str]], *, continues: bool) -> str:
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=continues)
        except TemplateError as error:
            raise ValueError(
                f"chat_template = true, but the template of the tokenizer {self.tokenizer.name_or_path!r} takes no "
                f"conversation of {' and '.join(role for role, _ in messages)} alone: {error}"
            ) from error
        assert isinstance(text, str)
        return text
