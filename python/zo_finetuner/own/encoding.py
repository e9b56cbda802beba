"""Rows of one's own data as token ids, with the tokens that are learned told apart and the longest rows cut.

    format              learned                                            too long
    text                every token but the first, and EOS behind it       loses its end
    prompt-completion   the completion, and EOS behind it                  the prompt loses tokens on its left; a
                                                                           completion longer than all, its end
    ... conversational  assistant turns of the completion                  as above
    messages            assistant turns                                    loses its end
    prompt              nothing (for objectives of one's own)              loses tokens on its left

What the tokenizer puts first (BOS) is never learned and never cut.  A token that reaches from the prompt into the
completion counts as the completion's.  A row that has lost everything learned is left out.  How many rows are cut, left
out, or have such a token is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from zo_finetuner.encoding import Encoded, cut_left, special_tokens, text_tokens
from zo_finetuner.errors import InputError
from zo_finetuner.own.chat import Chat, require_template, shared_length
from zo_finetuner.own.formats import Format, OwnRow


class Tokens(NamedTuple):
    """ids of a row; learned: places in them; prompt: what a model would be given to go on with; leading: special tokens
    in front; joined: whether a token reaches from the prompt into the completion."""

    ids: list[int]
    learned: list[int]
    prompt: list[int]
    leading: int
    joined: bool = False


def encode_own(
    rows: Sequence[OwnRow], format: Format, tokenizer: Any, max_length: int, split: str = ""
) -> list[Encoded]:
    """The rows in order, without those that max_length leaves nothing to learn of.

    Raises InputError for a row that has nothing to learn, and where none of them is left."""
    if format.chat:
        require_template(tokenizer)
    encodeds, cuts, lost, joined = [], [], 0, 0
    for place, row in rows:
        try:
            tokens = _tokens(row, format, tokenizer)
            if not tokens.learned and format.name != "prompt":
                raise InputError("no token of it would be learned")
            encoded = _cut(tokens, format, row, max_length)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        joined += tokens.joined
        cuts += [len(tokens.ids) - max_length] * (len(tokens.ids) > max_length)
        lost += encoded is None
        encodeds += [] if encoded is None else [encoded]
    what = f"{len(rows)} {split} rows".replace("  ", " ")
    if cuts:
        left_out = f"; {lost} lost all that is learned and were left out" if lost else ""
        warnings.warn(f"{len(cuts)} of {what} exceed {max_length} tokens, by up to {max(cuts)}, and were cut{left_out}",
                      stacklevel=2)
    if joined:
        warnings.warn(f"in {joined} of {what} a token reaches from the prompt into the completion, which a model that "
                      f"is given the prompt alone will not produce; begin completions with a space", stacklevel=2)
    if rows and not encodeds:
        raise InputError(f"none of the {what} keeps a token to learn within {max_length}; give a larger --max-length")
    return encodeds


def _tokens(row: dict[str, Any], format: Format, tokenizer: Any) -> Tokens:
    if format.chat:
        return _chat_tokens(row, format, tokenizer)
    leading, _ = special_tokens(tokenizer)
    if format.name == "prompt":
        ids = text_tokens(tokenizer, row["prompt"])
        return Tokens(ids, [], ids, leading)
    if format.name == "text":
        ids = _ended(tokenizer, text_tokens(tokenizer, row["text"]))
        first = max(1, leading)
        return Tokens(ids, list(range(first, len(ids))), ids[:first], leading)
    prompt = text_tokens(tokenizer, row["prompt"])
    both = text_tokens(tokenizer, row["prompt"] + row["completion"])
    shared = shared_length(prompt, both)
    if shared == len(both):
        raise InputError(f"the completion {row['completion'][:40]!r} adds no token to its prompt")
    ids = _ended(tokenizer, both)
    return Tokens(ids, list(range(max(1, shared), len(ids))), prompt, leading, shared < len(prompt))


def _chat_tokens(row: dict[str, Any], format: Format, tokenizer: Any) -> Tokens:
    chat = Chat(tokenizer, row["tools"] if isinstance(row.get("tools"), list) else None)
    if format.name == "prompt":
        ids = chat.prompt(row["prompt"])
        return Tokens(ids, [], ids, _leading(tokenizer, ids))
    given = len(row["prompt"]) if format.name == "prompt-completion" else 0
    messages = [*row["prompt"], *row["completion"]] if given else row["messages"]
    ids, learned = chat.encode(messages, given)
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    prompt = chat.prompt(messages[: given or last]) if given or last else ids[:1]
    return Tokens(ids, [place for place in learned if place > 0], prompt, _leading(tokenizer, ids))


def _leading(tokenizer: Any, ids: list[int]) -> int:
    return int(bool(ids) and ids[0] == tokenizer.bos_token_id)


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _cut(tokens: Tokens, format: Format, row: dict[str, Any], max_length: int) -> Encoded | None:
    """None where nothing learned is left."""
    ids, learned, leading = tokens.ids, tokens.learned, tokens.leading
    if not ids:
        raise InputError("it has no token")
    if max_length < leading + 2:
        raise InputError(f"max_length {max_length} leaves no room; it needs {leading + 2} or more")
    over = len(ids) - max_length
    if over > 0 and format.name in ("prompt-completion", "prompt"):
        # what can go on the left and leave a token to predict the first that is learned
        first = learned[0] if learned else len(ids)
        gone = max(0, min(over, first - leading - (leading == 0)))
        ids = ids[:leading] + ids[leading + gone :]
        learned = [place - gone for place in learned]
    ids = ids[:max_length]
    learned = [place for place in learned if place < len(ids)]
    if not learned and format.name != "prompt":
        return None
    first, last = (learned[0], learned[-1]) if learned else (len(ids), len(ids) - 1)
    ids = ids[: last + 1]  # what is behind the last learned token has no say in the loss
    places = set(learned)
    return Encoded(
        kind="own",
        sequences=(tuple(ids),),
        option_lengths=(len(ids) - first,),
        labels=(0,),
        prompt=cut_left(tokens.prompt or ids[:1], max_length, leading),
        cut=max(0, over),
        unscored=frozenset(place for place in range(first, len(ids)) if place not in places),
        row=row,
    )
