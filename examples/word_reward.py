"""A reward for what the model writes on its own: the share of sampled words that are on a list.  No gradient here.

    zo train --model M --data prompts.jsonl --objective examples/word_reward.py:happy_words --maximize ...

Rows: prompts alone will do.  Texts are sampled, and with the same draws in every probe of a step: what differs between
probes is due to the weights.
"""

from __future__ import annotations

import re

HAPPY = frozenset("happy smile smiled fun play played love loved nice friend friends good laugh laughed hug".split())
MAX_NEW_TOKENS = 16


def happy_words(model, tokenizer, batch):
    """Mean share of happy words, 0 to 1."""
    written = model.generate(
        input_ids=batch["prompt_ids"], attention_mask=batch["prompt_mask"], max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True, temperature=1.0, top_k=0, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    texts = tokenizer.batch_decode(written[:, batch["prompt_ids"].shape[1] :], skip_special_tokens=True)
    return sum(map(_share, texts)) / len(texts)


def _share(text):
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in HAPPY for word in words) / max(1, len(words))
