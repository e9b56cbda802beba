"""Rows to token ids and padded batches: stripping, option lengths, truncation, the forms of a batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from zo_finetuner.encoding import IGNORED, collate, encode, encode_rows, pad_left, special_tokens
from zo_finetuner.errors import InputError
from zo_finetuner.tasks import get_task

SST2, COPA, RECORD, SQUAD = (get_task(n) for n in ("sst2", "copa", "record", "squad"))
COPA_ROW = {"premise": "P.", "choice1": "A b.", "choice2": "C d.", "question": "cause", "label": 0}
RECORD_ROW = {"passage": "p", "query": "@placeholder won", "entities": ["A", "B"], "answers": ["B"]}
SQUAD_ROW = {"title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}}


@pytest.fixture(scope="module")
def characters():
    """A tokenizer with one token per byte and <s> (256) in front; pad is 257."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": 256, "<pad>": 257, "</s>": 258}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens(["<s>", "<pad>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>")


def with_eos(tokenizer):
    copy = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 258)]
    )
    return copy


def without_bos(tokenizer):
    copy = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return copy


def plain(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_encode_a_classification_row(characters):
    encoded = encode(SST2, {"sentence": "  fine ", "label": 1}, characters)
    assert encoded.sequences[0] == (256, *plain(characters, "fine It was terrible"))
    assert encoded.sequences[1] == (256, *plain(characters, "fine It was great"))
    assert encoded.option_lengths == (len(" terrible"), len(" great"))
    assert encoded.labels == (1,) and encoded.cut == 0 and not encoded.shares_prompt
    blank = encode(SST2, {"sentence": " ", "label": 1}, characters)  # text is left-stripped
    assert blank.sequences[1] == (256, *plain(characters, "It was great"))


def test_encode_strips_the_prompt_and_gives_the_space_to_the_option(characters):
    encoded = encode(COPA, COPA_ROW | {"label": 1}, characters)
    assert encoded.sequences[1] == (256, *plain(characters, "P because c d."))
    assert encoded.prompt == (256, *plain(characters, "P because"))
    assert encoded.option_lengths == (5, 5)  # " a b." with the space the prompt lost


def test_encode_a_generation_row(characters):
    encoded = encode(SQUAD, SQUAD_ROW, characters)
    assert encoded.sequences == ((256, *plain(characters, "Title: t\nContext: c\nQuestion: q\nAnswer: a\n")),)
    assert encoded.prompt == (256, *plain(characters, "Title: t\nContext: c\nQuestion: q\nAnswer:"))
    assert encoded.option_lengths == (3,) and encoded.answers == ("a",)


def test_record_trains_on_the_first_answer(characters):
    encoded = encode(RECORD, RECORD_ROW | {"answers": ["B", "A"]}, characters)
    assert encoded.labels == (1, 0)
    batch = collate([encoded], 257, multiple_of=1)
    assert batch["input_ids"].tolist() == [[256, *plain(characters, "p\n- B wo")]]
    assert batch["targets"].tolist() == [list(plain(characters, " B won"))]


def test_truncation_keeps_bos_and_the_end(characters):
    row = {"sentence": "abcdefghij", "label": 0}
    whole = encode(SST2, row, characters).sequences[0]
    cut = encode(SST2, row, characters, max_length=15)
    assert cut.sequences[0] == (256, *whole[-14:]) and cut.cut == len(whole) - 15
    assert len(cut.sequences[1]) == 15 and cut.option_lengths == (9, 6)
    bare = encode(SST2, row, without_bos(characters), max_length=15)
    assert bare.sequences[0] == whole[-15:]
    tight = encode(
        SST2, row, characters, max_length=5
    )  # an option longer than the length keeps one token before it
    assert tight.option_lengths == (4, 4)


def test_generation_leaves_room_for_the_answer(characters):
    encoded = encode(SQUAD, SQUAD_ROW | {"context": "c" * 100}, characters, max_length=80)
    assert len(encoded.prompt) == 30 and encoded.prompt[0] == 256
    with pytest.raises(
        InputError, match='max_length 50 leaves 0 tokens for a row of task "squad"; it needs 53 or more'
    ):
        encode(SQUAD, SQUAD_ROW, characters, max_length=50)


def test_an_appended_eos_is_left_out(characters):
    eos = with_eos(characters)
    assert special_tokens(characters) == (1, 0) and special_tokens(eos) == (1, 1)
    row = {"sentence": "fine", "label": 1}
    assert encode(SST2, row, eos) == encode(SST2, row, characters)


def test_truncation_is_told_once_with_a_count(characters):
    rows = [{"sentence": "x" * n, "label": 0} for n in (1, 50, 60)]
    with pytest.warns(UserWarning) as caught:
        encode_rows(SST2, rows, characters, max_length=30)
    # <s>, the sentence, " It was terrible": 1 + 60 + 16 tokens
    assert [str(w.message) for w in caught] == [
        "2 of 3 sst2 rows exceed 30 tokens and lost up to 47 tokens on the left"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_rows(SST2, rows, characters)


def test_an_option_without_tokens_is_an_error(characters):
    with pytest.raises(InputError, match=r"row 1 \(from 0\): task \"copa\": the option ' ' adds no token"):
        encode_rows(COPA, [COPA_ROW, COPA_ROW | {"choice1": " "}], characters)


def test_collate_pads_on_the_left():
    batch = pad_left([[5, 6, 7], [8]], 9, multiple_of=4)
    assert batch["input_ids"].tolist() == [[9, 5, 6, 7], [9, 9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]


def test_collate_forms(characters, shared):
    lm = collate([encode(COPA, COPA_ROW | {"label": i}, characters) for i in (0, 1)], 257)
    assert set(lm) == {"input_ids", "attention_mask", "position_ids", "targets", "counted"}
    assert lm["input_ids"].shape == (2, 16) and lm["counted"].tolist() == list(range(10))

    rows = [{"sentence": "fine", "label": 1}, {"sentence": "bad", "label": 0}]
    per_candidate = collate([encode(SST2, row, characters) for row in rows], 257)
    assert per_candidate["input_ids"].shape[0] == 4 and per_candidate["gold"].tolist() == [1, 0]
    assert per_candidate["members"].tolist() == [[0, 1], [2, 3]] and per_candidate["valid"].all()
    great = [IGNORED] * 3 + list(plain(characters, " great"))
    assert per_candidate["targets"][1].tolist() == great and per_candidate["targets"][3].tolist() == great

    # " great" (606) and " terrible" (1639) are single tokens of this one: one prompt a row, no targets
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "imdb-llama-6m")
    one_prompt = collate([encode(SST2, row, tokenizer) for row in rows], 2)
    assert set(one_prompt) == {
        "input_ids",
        "attention_mask",
        "position_ids",
        "candidates",
        "members",
        "valid",
        "gold",
    }
    assert one_prompt["candidates"].tolist() == [606, 1639]
    assert one_prompt["members"].tolist() == [[1, 0], [1, 0]]
    assert one_prompt["input_ids"][0, -1] == tokenizer("fine It was")["input_ids"][-1]
    assert all(isinstance(v, torch.Tensor) for v in one_prompt.values())


def test_unequal_numbers_of_candidates(characters):
    record = [RECORD_ROW, RECORD_ROW | {"entities": ["A", "B", "C"]}]
    batch = collate([encode(RECORD, row, characters) for row in record], 257, gold_only=False)
    assert batch["valid"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["members"].tolist() == [[0, 1, 0], [2, 3, 4]]
