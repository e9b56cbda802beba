"""The eleven templates against strings written out by hand, and the metrics against values worked out by
hand."""

from __future__ import annotations

import json

import pytest

from zo_finetuner.errors import InputError
from zo_finetuner.tasks import TASKS, accuracy, exact_match, f1, get_task, normalize_answer

# task: (row, prompt, candidates, label). All but RTE and MultiRC are the first rows of real files, some
# shortened.
EXPECTED = {
    "sst2": (
        {"sentence": "you should be able to find better entertainment . ", "label": 0},
        "you should be able to find better entertainment . It was",
        [" terrible", " great"],
        0,
    ),
    "rte": (
        {"premise": "No weapons were found.", "hypothesis": "Weapons were found.", "label": 1},
        'No weapons were found.\nDoes this mean that "Weapons were found." is true? Yes or No?\n',
        ["Yes", "No"],
        1,
    ),
    "cb": (
        {
            "premise": "I say that no women are allowed.",
            "hypothesis": "no women are allowed",
            "label": 2,
        },
        "Suppose I say that no women are allowed. Can we infer that "
        '"no women are allowed"? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
        2,
    ),
    "boolq": (
        {
            "question": "does poland spring water come from a spring",
            "passage": "Poland Spring -- It is.",
            "label": 1,
        },
        "Poland Spring -- It is. Does poland spring water come from a spring?\n",
        ["Yes", "No"],
        0,
    ),
    "wsc": (
        {
            "text": "The scientists are studying fish. They appeared two years ago.",
            "span1_text": "The scientists",
            "span2_text": "They",
            "label": 0,
        },
        "The scientists are studying fish. They appeared two years ago.\n"
        'In the previous sentence, does the pronoun "they" refer to The scientists? Yes or No?\n',
        ["No", "Yes"],
        0,
    ),
    "wic": (
        {
            "word": "go",
            "sentence1": "This violinist is as good as Juilliard-trained violinists go.",
            "sentence2": "How fast does your new car go?",
            "label": 0,
        },
        'Does the word "go" have the same meaning in these two sentences? Yes, No?\n'
        "This violinist is as good as Juilliard-trained violinists go.\nHow fast does your new car go?\n",
        ["No", "Yes"],
        0,
    ),
    "multirc": (
        {"paragraph": "Tom ran home.", "question": "Who ran?", "answer": "Tom", "label": 1},
        'Tom ran home.\nQuestion: Who ran?\nI found this answer "Tom". Is that correct? Yes or No?\n',
        ["No", "Yes"],
        1,
    ),
    "copa": (
        {
            "premise": "The man dressed in his best suit.",
            "choice1": "He scheduled a meeting with an important client.",
            "choice2": "I bought him a new tie.",
            "question": "cause",
            "label": 0,
        },
        "The man dressed in his best suit because ",
        ["he scheduled a meeting with an important client.", "I bought him a new tie."],
        0,
    ),
    "record": (
        {
            "passage": "Thousands came.\n@highlight\nHis training has begun\n@highlight\nBhutto was killed",
            "query": "'Long live @placeholder.'",
            "entities": ["Islamabad", "Benazir Bhutto", "Bhutto"],
            "answers": ["Bhutto", "Benazir Bhutto"],
        },
        "Thousands came.\n- His training has begun\n- Bhutto was killed\n-",
        [" 'Long live Islamabad.'", " 'Long live Benazir Bhutto.'", " 'Long live Bhutto.'"],
        [2, 1],
    ),
    "squad": (
        {
            "title": "Private_school",
            "context": "The Act of 1996 recognises two categories.",
            "question": " In what year was the Act passed? ",
            "answers": {"text": ["1996", "in 1996"], "answer_start": [11, 8]},
        },
        "Title: Private_school\nContext: The Act of 1996 recognises two categories.\n"
        "Question: In what year was the Act passed?\nAnswer:",
        [" 1996\n"],
        0,
    ),
    "drop": (
        {
            "passage": "The Jets flew to Cleveland.",
            "question": "Who scored?",
            "answers_spans": {"spans": ["Jerricho Cotchery", "Cotchery"], "types": ["span", "span"]},
        },
        "Passage: The Jets flew to Cleveland.\nQuestion: Who scored?\nAnswer:",
        [" Jerricho Cotchery\n"],
        0,
    ),
}


def test_the_protocol_has_eleven_tasks():
    assert list(TASKS) == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_template(name):
    row, prompt, candidates, label = EXPECTED[name]
    task = get_task(name)
    assert set(task.fields) <= set(row)
    assert task.prompt(row) == prompt
    assert task.candidates(row) == candidates
    assert task.label(row) == label


def test_template_details():
    boolq, copa = get_task("boolq"), get_task("copa")
    assert boolq.prompt({"passage": "P.", "question": "is it?"}) == "P. Is it?\n"
    assert boolq.label({"label": 0}) == 1  # "No" is the second word
    row = EXPECTED["copa"][0] | {"question": "effect", "premise": "It rained. "}
    assert copa.prompt(row) == "It rained so "
    assert get_task("squad").answers(EXPECTED["squad"][0]) == ["1996", "in 1996"]
    assert get_task("drop").answers(EXPECTED["drop"][0]) == ["Jerricho Cotchery", "Cotchery"]
    assert get_task("sst2").answers(EXPECTED["sst2"][0]) == []


@pytest.mark.parametrize("name", [n for n in EXPECTED if n not in ("rte", "multirc")])
def test_real_rows(shared, name):
    """Every real row reads: its prompt holds the row's texts, and its label points at a candidate."""
    task = get_task(name)
    for line in (shared / "data" / name / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, candidates, label = task.prompt(row), task.candidates(row), task.label(row)
        for index in label if isinstance(label, list) else [label]:
            assert 0 <= index < len(candidates)
        assert all(c.strip() for c in candidates)
        text = prompt + candidates[0]
        for field in ("sentence", "hypothesis", "passage", "context", "sentence1", "sentence2", "text"):
            # ReCoRD's highlight marks become bullets; SST-2's trailing space goes.
            assert row.get(field, "").split("@highlight")[0].strip() in text
        assert "@highlight" not in text and "@placeholder" not in text


def test_kinds_metrics_and_sizes():
    kinds = {name: task.kind for name, task in TASKS.items()}
    assert {n for n, k in kinds.items() if k == "generation"} == {"squad", "drop"}
    assert {n for n, k in kinds.items() if k == "multiple_choice"} == {"copa", "record"}
    assert {n for n, t in TASKS.items() if t.metric == "f1"} == {"squad", "drop"}
    sizes = {name: (task.train, task.dev, task.eval) for name, task in TASKS.items()}
    special = {"cb": (150, 100, 1000), "copa": (300, 100, 1000), "wsc": (454, 100, 1000)}
    assert sizes == {name: special.get(name, (1000, 500, 1000)) for name in TASKS}


def test_task_names():
    assert get_task("SST-2") is TASKS["sst2"]
    with pytest.raises(
        InputError, match=r'task "bolq" is unknown \(did you mean "boolq"\?\); tasks are: sst2'
    ):
        get_task("bolq")


def test_normalize_answer():
    assert normalize_answer("The  U.S. Army's\n  an-other, A/C") == "us armys another ac"
    assert normalize_answer("Anthem of theatre") == "anthem of theatre"  # articles are whole words
    assert normalize_answer(" the ") == ""


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Jets.", ["jets"], 1.0),
        ("New York Jets", ["the Jets"], 0.5),  # P = 1/3, R = 1
        ("New York Jets", ["Cleveland", "York Jets"], 0.8),  # the better gold: P = 2/3, R = 1
        ("Browns", ["Jets"], 0.0),
        ("a a b b b", ["b b c"], 2 / 3),  # articles go; P = R = 2/3, b counts as often as both have it
        ("", ["Jets"], 0.0),
        ("the", ["an"], 1.0),  # both normalise to nothing
        ("no answer", ["no answer"], 1.0),
        ("no answer there", ["no answer"], 0.0),  # no part marks for "no answer"
        ("CANNOTANSWER.", ["CANNOTANSWER"], 1.0),
        ("32", ["no answer", "32"], 0.0),
    ],
)
def test_f1(prediction, answers, expected):
    assert f1(prediction, answers) == pytest.approx(expected, rel=1e-12)


def test_exact_match_and_accuracy():
    assert exact_match("The Jets!", ["Browns", "jets"]) == 1.0
    assert exact_match("New Jets", ["Browns", "jets"]) == 0.0
    assert accuracy([1, 0, 2, 2], [1, 1, [0, 2], (0, 1)]) == 0.5
