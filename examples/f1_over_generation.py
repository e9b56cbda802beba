"""Token F1 of what the model writes, against the rows' completions.  Nothing here has a gradient.

    zo train --model M --data qa.jsonl --objective examples/f1_over_generation.py:f1 --maximize ...

Rows: prompt and completion (texts).  The answer is written greedily, token by token, and ends at the first line break.
"""

from __future__ import annotations

from zo_finetuner.tasks import f1 as token_f1

MAX_NEW_TOKENS = 8


def f1(model, tokenizer, batch):
    """Mean F1 over the batch, 0 to 1."""
    written = model.generate(
        input_ids=batch["prompt_ids"], attention_mask=batch["prompt_mask"], max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    answers = tokenizer.batch_decode(written[:, batch["prompt_ids"].shape[1] :], skip_special_tokens=True)
    scores = [
        token_f1(answer.strip().split("\n")[0], [row["completion"]])
        for answer, row in zip(answers, batch["rows"], strict=True)
    ]
    return sum(scores) / len(scores)
