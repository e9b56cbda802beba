"""The eleven tasks of MeZO's experiments (Malladi et al. 2023, appendix E): one entry each.

A task turns a row with Hugging Face field names into a prompt and the continuations that are scored after it.
Spaces matter: a continuation carries a leading space where the space belongs to the label word, and a
prompt's trailing space (COPA) is given as the text reads; `encoding` decides which token it ends up in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zo_finetuner.errors import InputError, nearest

Row = Mapping[str, Any]

# What a field must hold, read by `data.check_row`: `str`; `[str]`, one or more non-blank texts; `{name:
# kind}`, an object; a frozenset, one of these words; a tuple, the class names of an integer label.
Kind = type | list | dict | frozenset | tuple


@dataclass(frozen=True)
class Task:
    """One task: where its rows come from, how a row reads, which loss trains it and which metric counts.

    kind            training loss                                                    evaluation
    classification  cross-entropy over the candidates' mean log-probs per token      accuracy
    multiple_choice cross-entropy per token of the correct candidate                 accuracy
    generation      cross-entropy per token of the first gold answer                 F1 of greedy text

    label(row) is an index into candidates(row), or a list of them where several are correct (training uses
    the first). answers(row) are the gold texts of a generation task, else empty. train, dev and eval are the
    protocol's numbers of rows. fault(row) names what is wrong between the fields of a row, or is None.
    """

    name: str
    kind: str
    hub: tuple[str, str | None]
    fields: Mapping[str, Kind]
    prompt: Callable[[Row], str]
    candidates: Callable[[Row], list[str]]
    label: Callable[[Row], int | list[int]]
    answers: Callable[[Row], list[str]] = lambda row: []
    metric: str = "accuracy"
    train: int = 1000
    dev: int = 500
    eval: int = 1000
    fault: Callable[[Row], str | None] = lambda row: None


def _label(row: Row) -> int:
    return row["label"]


def _words(*continuations: str) -> Callable[[Row], list[str]]:
    return lambda row: list(continuations)


SST2 = Task(
    name="sst2",
    kind="classification",
    hub=("nyu-mll/glue", "sst2"),
    fields={"sentence": str, "label": ("terrible", "great")},
    prompt=lambda row: f"{row['sentence'].strip()} It was",
    candidates=_words(" terrible", " great"),
    label=_label,
)

RTE = Task(
    name="rte",
    kind="classification",
    hub=("aps/super_glue", "rte"),
    fields={"premise": str, "hypothesis": str, "label": ("entailment", "not_entailment")},
    prompt=lambda row: f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes or No?\n',
    candidates=_words("Yes", "No"),
    label=_label,
)

CB = Task(
    name="cb",
    kind="classification",
    hub=("aps/super_glue", "cb"),
    fields={"premise": str, "hypothesis": str, "label": ("entailment", "contradiction", "neutral")},
    prompt=lambda row: (
        f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n'
    ),
    candidates=_words("Yes", "No", "Maybe"),
    label=_label,
    train=150,  # all that 250 rows leave beside the 100 of dev
    dev=100,
)


def _boolq_prompt(row: Row) -> str:
    question = row["question"]
    question = question[:1].upper() + question[1:]
    return f"{row['passage']} {question}{'' if question.endswith('?') else '?'}\n"


BOOLQ = Task(
    name="boolq",
    kind="classification",
    hub=("aps/super_glue", "boolq"),
    fields={"passage": str, "question": str, "label": ("False", "True")},
    prompt=_boolq_prompt,
    candidates=_words("Yes", "No"),
    label=lambda row: 0 if row["label"] == 1 else 1,  # "Yes" comes first, "True" is 1
)

WSC = Task(
    name="wsc",
    kind="classification",
    hub=("aps/super_glue", "wsc.fixed"),
    fields={"text": str, "span1_text": str, "span2_text": str, "label": ("False", "True")},
    prompt=lambda row: (
        f'{row["text"]}\nIn the previous sentence, does the pronoun "{row["span2_text"].lower()}" '
        f"refer to {row['span1_text']}? Yes or No?\n"
    ),
    candidates=_words("No", "Yes"),
    label=_label,
    # Not MeZO's own split: with its dev of 500, only 54 of the 554 rows would be left to train on.
    train=454,
    dev=100,
)

WIC = Task(
    name="wic",
    kind="classification",
    hub=("aps/super_glue", "wic"),
    fields={"word": str, "sentence1": str, "sentence2": str, "label": ("False", "True")},
    prompt=lambda row: (
        f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No?\n'
        f"{row['sentence1']}\n{row['sentence2']}\n"
    ),
    candidates=_words("No", "Yes"),
    label=_label,
)

MULTIRC = Task(
    name="multirc",
    kind="classification",
    hub=("aps/super_glue", "multirc"),
    fields={"paragraph": str, "question": str, "answer": str, "label": ("False", "True")},
    prompt=lambda row: (
        f"{row['paragraph']}\nQuestion: {row['question']}\n"
        f'I found this answer "{row["answer"]}". Is that correct? Yes or No?\n'
    ),
    candidates=_words("No", "Yes"),
    label=_label,
)


def _copa_prompt(row: Row) -> str:
    conjunction = {"effect": " so ", "cause": " because "}[row["question"]]
    return row["premise"].rstrip().removesuffix(".") + conjunction


def _mid_sentence(choice: str) -> str:
    first, space, rest = choice.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def _copa_fault(row: Row) -> str | None:
    blank = [name for name in ("choice1", "choice2") if not row[name].strip()]
    return f'field "{blank[0]}" is blank; write the sentence to choose' if blank else None


COPA = Task(
    name="copa",
    kind="multiple_choice",
    hub=("aps/super_glue", "copa"),
    fields={
        "premise": str,
        "choice1": str,
        "choice2": str,
        "question": frozenset({"cause", "effect"}),
        "label": ("choice1", "choice2"),
    },
    prompt=_copa_prompt,
    candidates=lambda row: [_mid_sentence(row["choice1"]), _mid_sentence(row["choice2"])],
    label=_label,
    train=300,  # all that 400 rows leave beside the 100 of dev
    dev=100,
    fault=_copa_fault,
)


def _record_label(row: Row) -> list[int]:
    return [row["entities"].index(answer) for answer in row["answers"] if answer in row["entities"]]


def _record_fault(row: Row) -> str | None:
    if "@placeholder" not in row["query"]:
        return 'field "query" holds no "@placeholder"; put it where the entity goes'
    if not _record_label(row):
        return 'no text of field "answers" is among "entities"; add the answer to "entities"'
    return None


RECORD = Task(
    name="record",
    kind="multiple_choice",
    hub=("aps/super_glue", "record"),
    fields={"passage": str, "query": str, "entities": [str], "answers": [str]},
    prompt=lambda row: row["passage"].replace("@highlight\n", "- ") + "\n-",
    candidates=lambda row: [" " + row["query"].replace("@placeholder", name) for name in row["entities"]],
    label=_record_label,
    fault=_record_fault,
)

SQUAD = Task(
    name="squad",
    kind="generation",
    hub=("rajpurkar/squad", None),
    fields={"title": str, "context": str, "question": str, "answers": {"text": [str]}},
    prompt=lambda row: (
        f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:"
    ),
    candidates=lambda row: [f" {row['answers']['text'][0]}\n"],
    label=lambda row: 0,
    answers=lambda row: list(row["answers"]["text"]),
    metric="f1",
)

DROP = Task(
    name="drop",
    kind="generation",
    hub=("ucinlp/drop", None),
    fields={"passage": str, "question": str, "answers_spans": {"spans": [str]}},
    prompt=lambda row: f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:",
    candidates=lambda row: [f" {row['answers_spans']['spans'][0]}\n"],
    label=lambda row: 0,
    answers=lambda row: list(row["answers_spans"]["spans"]),
    metric="f1",
)

TASKS: dict[str, Task] = {
    task.name: task for task in (SST2, RTE, CB, BOOLQ, WSC, WIC, MULTIRC, COPA, RECORD, SQUAD, DROP)
}


def get_task(name: str) -> Task:
    """The task of that name (any case; "SST-2" is "sst2"). Raises InputError, offering the nearest name."""
    key = name.lower().replace("-", "").replace("_", "")
    if key not in TASKS:
        raise InputError(f'task "{name}" is unknown{nearest(key, TASKS)}; tasks are: {", ".join(TASKS)}')
    return TASKS[key]
