"""Conversations as token ids, with the tokens of assistant turns told apart, by the tokenizer's chat template.

Where the template marks them ({% generation %}), its mask says which they are.  Elsewhere a turn is what the rendered
text adds: from the end of the earlier turns with the generation prompt to the end of the earlier turns with this one.
That both are beginnings of the whole conversation is checked for every turn: a template that renders a turn differently
once others follow (it drops reasoning, say) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from zo_finetuner.errors import InputError

Messages = Sequence[dict[str, Any]]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def require_template(tokenizer: Any) -> None:
    """InputError for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"the tokenizer ({tokenizer.name_or_path}) has no chat template, which conversational rows need: use "
            f"that of a chat model, or write prompt and completion as texts"
        )


class Chat:
    """The chat template of a tokenizer that has one (`require_template`).  tools: what it is given as such."""

    def __init__(self, tokenizer: Any, tools: list[Any] | None = None):
        self._tokenizer, self._tools = tokenizer, tools

    def encode(self, messages: Messages, given: int = 0) -> tuple[list[int], list[int]]:
        """(token ids, places in them of the tokens of assistant turns).  given: leading messages that are no targets.

        Raises InputError for what the template refuses."""
        if _MARKS.search(str(self._tokenizer.chat_template)):
            ids, places = self._marked(messages)
            first = shared_length(ids, self.prompt(messages[:given])) if given else 0
            return ids, [place for place in places if place >= first]
        return self._by_difference(messages, given)

    def prompt(self, messages: Messages) -> list[int]:
        """Token ids of the conversation so far, to be gone on with by the assistant."""
        return self._ids(self._render(messages, add_generation_prompt=True))

    def _marked(self, messages: Messages) -> tuple[list[int], list[int]]:
        made = self._asked(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(made["input_ids"]), list(made["assistant_masks"])
        places = [place for place, marked in enumerate(mask) if marked]
        if not places:
            raise InputError("the chat template's {% generation %} marks no token of this conversation")
        return ids, places

    def _by_difference(self, messages: Messages, given: int) -> tuple[list[int], list[int]]:
        whole = self._render(messages)
        ids = self._ids(whole)
        places: list[int] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number < given:
                continue
            if number == 0:
                raise InputError("it begins with an assistant turn, before which the template has nothing to render; "
                                 "begin with a system or user message")
            earlier, through = self._render(messages[:number]), self._render(messages[: number + 1])
            for beginning in (earlier, through):
                if not whole.startswith(beginning):
                    raise InputError(
                        f"the chat template renders message {number} (from 0) or what is before it differently once "
                        f"other messages follow, so that its tokens cannot be told; mark them with {{% generation %}} "
                        f"in the template, or make rows of prompt and completion, one for each turn"
                    )
            # "<|assistant|>" is given at inference; a generation prompt may have more than the turn ("<think>")
            start = shared_length(whole, self._render(messages[:number], add_generation_prompt=True))
            first = shared_length(ids, self._ids(whole[: max(start, len(earlier))]))
            places += range(first, shared_length(ids, self._ids(through)))
        return ids, places

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        return self._asked(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _asked(self, messages: Messages, **how: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(list(messages), tools=self._tools, **how)
        except (TemplateError, TypeError, KeyError, ValueError) as error:  # `raise_exception("roles must alternate")`
            raise InputError(f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from None

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # the template has them


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading elements (tokens, characters) are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
