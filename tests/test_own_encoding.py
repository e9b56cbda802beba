"""Tokens of one's own rows: which are learned, what is cut, and losses equal to the model's own on those labels."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from zo_finetuner.encoding import collate
from zo_finetuner.errors import InputError
from zo_finetuner.evaluation import mean_token_loss
from zo_finetuner.isolation import can_pack
from zo_finetuner.objective import training_loss
from zo_finetuner.own.encoding import encode_own
from zo_finetuner.own.formats import Format, OwnRow

TEXT, PAIR, PAIR_CHAT = Format("text", False), Format("prompt-completion", False), Format("prompt-completion", True)
MESSAGES, PROMPT, PROMPT_CHAT = Format("messages", True), Format("prompt", False), Format("prompt", True)

# A turn is "<u>hello</t>" or "<a>fine</t>"; "<s>" begins a conversation and "<a>" asks for an answer.
TURNS = "{{ bos_token }}{% for m in messages %}{{ '<a>' if m.role == 'assistant' else '<u>' }}TURN{% endfor %}" \
        "{% if add_generation_prompt %}<a>{% endif %}"
PLAIN = TURNS.replace("TURN", "{{ m.content }}</t>")
MARKED = TURNS.replace(
    "TURN", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</t>{% endgeneration %}"
    "{% else %}{{ m.content }}</t>{% endif %}",
)  # fmt: skip
FORGETS = TURNS.replace("TURN", "{{ m.content if loop.last else '' }}</t>")  # as those that drop earlier reasoning
THINKS = PLAIN.replace("<a>{% endif %}", "<a>?{% endif %}")  # asks for more than what a rendered turn begins with
STRICT = "{{ raise_exception('roles must alternate') }}"


def made(template=None, bos=True):
    """One token per character, but "ab" and "!</s>"-free specials; ids are the places in `names`."""
    names = ["<pad>", "<s>", "</s>", "<u>", "<a>", "</t>", *"abcdefghij !?", "ab"]
    raw = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.Sequence([])
    raw.add_special_tokens(names[:6])
    single = "<s> $A" if bos else "$A"
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>" if bos else None, eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def encoded(format, row, tokenizer=None, limit=100, **more):
    return encode_own([OwnRow("here", row)], format, tokenizer or made(**more), limit, "train")


def shown(example, tokenizer=None):
    """A sequence as text, what is learned in capitals between bars."""
    tokenizer = tokenizer or made()
    sequence, targets = example.candidate(0)
    names = tokenizer.convert_ids_to_tokens(sequence)
    first = len(sequence) - len(targets)
    return "".join(name if i < first or targets[i - first] < 0 else f"|{name}" for i, name in enumerate(names))


def turns(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_every_token_of_a_text_is_learned_but_the_first():
    (example,) = encoded(TEXT, {"text": "cab"})
    assert shown(example) == "<s>|c|ab|</s>" and example.prompt == (1,)
    (example,) = encoded(TEXT, {"text": "cab"}, bos=False)
    assert shown(example) == "c|ab|</s>"
    with pytest.raises(InputError, match="here: no token of it would be learned"):
        tokenizer = made(bos=False)
        tokenizer.eos_token = None
        encoded(TEXT, {"text": "c"}, tokenizer)


def test_of_a_pair_the_completion_is_learned():
    (example,) = encoded(PAIR, {"prompt": "cd", "completion": " ab"})
    assert shown(example) == "<s>cd| |ab|</s>" and example.prompt == (1, 8, 9)
    assert example.row["prompt"] == "cd"
    (example,) = encoded(PAIR, {"prompt": "", "completion": "c"})
    assert shown(example) == "<s>|c|</s>"
    (example,) = encoded(PAIR, {"prompt": "", "completion": "cd"}, bos=False)
    assert shown(example) == "c|d|</s>"


def test_a_token_across_the_border_is_the_completions_and_told():
    with pytest.warns(UserWarning, match="in 1 of 1 train rows a token reaches from the prompt into the completion"):
        (example,) = encoded(PAIR, {"prompt": "ca", "completion": "bd"})
    assert shown(example) == "<s>c|ab|d|</s>" and example.prompt == (1, 8, 6)


@pytest.mark.parametrize("template", [PLAIN, MARKED, THINKS])
def test_of_a_conversation_assistant_turns_are_learned(template):
    (example,) = encoded(MESSAGES, {"messages": turns("c", "ab", "d", "e!", "f")}, template=template)
    assert shown(example) == "<s><u>c</t><a>|ab|</t><u>d</t><a>|e|!|</t>"  # what is behind it has no say
    asked = "<a>?" if template is THINKS else "<a>"
    assert "".join(made().convert_ids_to_tokens(example.prompt)) == "<s><u>c</t><a>ab</t><u>d</t>" + asked
    pair = {"prompt": turns("c", "ab", "d"), "completion": turns("e!", first="assistant")}
    (example,) = encoded(PAIR_CHAT, pair, template=template)
    assert shown(example) == "<s><u>c</t><a>ab</t><u>d</t><a>|e|!|</t>"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_tools_of_a_row_are_given_to_the_template(template):
    row = {"messages": turns("c", "ab"), "tools": [{"name": "d"}, {"name": "e"}]}
    (example,) = encoded(MESSAGES, row, template="{% for t in tools or [] %}{{ t.name }}{% endfor %}" + template)
    assert shown(example) == "de<s><u>c</t><a>|ab|</t>"


def test_templates_that_do_not_tell_turns_apart_are_refused():
    row = {"messages": turns("c", "ab", "d", "e!")}
    with pytest.raises(InputError, match="here: the chat template renders message 1 .* with {% generation %}"):
        encoded(MESSAGES, row, template=FORGETS)
    (example,) = encoded(MESSAGES, {"messages": turns("", "e!")}, template=FORGETS)  # one turn: nothing to forget
    assert shown(example) == "<s><u></t><a>|e|!|</t>"
    with pytest.raises(InputError, match="here: the chat template refuses it: roles must alternate"):
        encoded(MESSAGES, row, template=STRICT)
    with pytest.raises(InputError, match="here: it begins with an assistant turn"):
        encoded(MESSAGES, {"messages": turns("ab", first="assistant")}, template=PLAIN)
    with pytest.raises(InputError, match="has no chat template, which conversational rows need"):
        encoded(MESSAGES, row)
    assert shown(*encoded(MESSAGES, {"messages": turns("ab", first="assistant")}, template=MARKED)) == "<s><a>|ab|</t>"


def test_prompts_alone_learn_nothing():
    with pytest.warns(UserWarning, match="were cut"):
        (example,) = encoded(PROMPT, {"prompt": "cdefgh"}, limit=4)
    assert example.candidate(0) == ((1, 11, 12, 13), ()) and example.prompt == (1, 11, 12, 13)
    (example,) = encoded(PROMPT_CHAT, {"prompt": turns("c")}, template=PLAIN)
    assert "".join(made().convert_ids_to_tokens(example.prompt)) == "<s><u>c</t><a>"


@pytest.mark.parametrize(
    ("format", "row", "limit", "left"),
    [
        (TEXT, {"text": "cdefg"}, 4, "<s>|c|d|e"),
        (PAIR, {"prompt": "cdef", "completion": "gh"}, 6, "<s>ef|g|h|</s>"),
        (PAIR, {"prompt": "cdef", "completion": "ghij"}, 4, "<s>|g|h|i"),
        (MESSAGES, {"messages": turns("c", "ab", "d", "e!")}, 8, "<s><u>c</t><a>|ab|</t>"),
        (MESSAGES, {"messages": turns("c", "de")}, 6, "<s><u>c</t><a>|d"),
        (PAIR_CHAT, {"prompt": turns("cdef"), "completion": turns("g", first="assistant")}, 6, "<s>f</t><a>|g|</t>"),
    ],
)
def test_what_is_too_long_is_cut_and_told(format, row, limit, left):
    with pytest.warns(UserWarning, match=f"1 of 1 train rows exceed {limit} tokens, by up to .*, and were cut$"):
        (example,) = encoded(format, row, limit=limit, template=PLAIN)
    assert shown(example) == left and example.cut > 0 and len(example.sequences[0]) <= limit


def test_without_a_first_token_a_prompt_keeps_one_to_predict_from():
    with pytest.warns(UserWarning, match="were cut"):
        (example,) = encoded(PAIR, {"prompt": "cdef", "completion": "gh"}, limit=3, bos=False)
    assert shown(example) == "f|g|h"


def test_rows_that_lose_all_that_is_learned_are_left_out_and_counted():
    rows = [OwnRow(str(i), {"messages": turns("c" * n, "d")}) for i, n in enumerate((1, 9, 2))]
    with pytest.warns(UserWarning, match="1 of 3 dev rows exceed 8 tokens, by up to 7, .*; 1 lost all that is learned"):
        examples = encode_own(rows, MESSAGES, made(PLAIN), 8, "dev")
    assert [example.row for example in examples] == [rows[0].row, rows[2].row]
    with pytest.raises(InputError, match="none of the 1 dev rows keeps a token to learn within 8"), \
            warnings.catch_warnings(action="ignore"):
        encode_own(rows[1:2], MESSAGES, made(PLAIN), 8, "dev")
    with pytest.raises(InputError, match="here: max_length 2 leaves no room; it needs 3 or more"):
        encoded(TEXT, {"text": "c"}, limit=2)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("few_shapes", [False, True])
def test_the_loss_is_the_models_own_on_these_labels(name, few_shapes):
    """Packed and padded, holes between the turns included; the evaluation counts every token once too."""
    model, tokenizer = tiny(name), made(PLAIN)
    rows = [turns("c", "ab", "de", "e!"), turns("cdefg", "h"), turns("i", "ababab", "j", "", "c", "d")]
    examples = encode_own([OwnRow("", {"messages": m}) for m in rows], MESSAGES, tokenizer, 64)
    assert any(example.unscored for example in examples)
    total, count = 0.0, 0
    for example in examples:
        sequence, targets = example.candidate(0)
        labels = torch.tensor([[-100] * (len(sequence) - len(targets)) + list(targets)])
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([sequence]), labels=labels).loss) * int((labels >= 0).sum())
        count += int((labels >= 0).sum())
    assert can_pack(model)
    for packed in (False, True):
        with torch.no_grad():
            loss, weight = training_loss(model, collate(examples, 0, packed=packed, few_shapes=few_shapes))
        assert int(weight) == count and float(loss) == pytest.approx(total, rel=1e-5)
    assert mean_token_loss(model, examples, 0, batch_size=2) == pytest.approx(total / count, rel=1e-5)
