"""Scores of predictions: accuracy, and the token F1 and exact match of SQuAD and DROP answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

# Golds that say "there is no answer" (CoQA and SQuAD 2.0 spelling): nothing but the same words scores.
NO_ANSWER = ("CANNOTANSWER", "no answer")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces (Rajpurkar et al. 2016, SQuAD 1.1)."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Largest token F1 of the prediction over the gold answers, in 0..1, after `normalize_answer`.

    A gold "no answer" and texts that normalise to nothing score 1 on equality and 0 otherwise (SQuAD 2.0).
    """
    if answers[0] in NO_ANSWER:
        return exact_match(prediction, answers[:1])
    tokens = normalize_answer(prediction).split()
    return max(_token_f1(tokens, normalize_answer(gold).split()) for gold in answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction equals any gold answer after `normalize_answer`, else 0.0."""
    return float(normalize_answer(prediction) in {normalize_answer(gold) for gold in answers})


def accuracy(predictions: Sequence[int], labels: Sequence[int | Sequence[int]]) -> float:
    """Share of predicted candidate indices that are (one of) the correct ones, in 0..1."""
    hits = (p == y if isinstance(y, int) else p in y for p, y in zip(predictions, labels, strict=True))
    return sum(hits) / len(labels)


def _token_f1(prediction: list[str], gold: list[str]) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    shared = (Counter(prediction) & Counter(gold)).total()
    # 2PR / (P + R) with P = shared / |prediction| and R = shared / |gold|, in its form without a 0 / 0.
    return 2 * shared / (len(prediction) + len(gold))
