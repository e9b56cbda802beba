"""Rows to token ids and batches: stripping, option lengths, truncation, the forms of a batch, padded and packed."""

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


def test_prompts_to_generate_from_are_padded_on_the_left():
    batch = pad_left([[5, 6, 7], [8]], 9, multiple_of=4)
    assert batch["input_ids"].tolist() == [[9, 5, 6, 7], [9, 9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]


INPUTS = {"input_ids", "position_ids", "places", "chosen"}
SHARED = {"trunks", "branches"}


def predicted(batch):
    """For every label the token that is fed there; targets are what follows it."""
    rows, width = batch["places"].shape
    row, column = batch["chosen"] // width, batch["chosen"] % width
    return batch["input_ids"][row, batch["places"][row, column]].tolist()


def test_collate_answers(characters):
    rows = [COPA_ROW, COPA_ROW | {"choice2": "C def.", "label": 1}]
    short, long = encodeds = [encode(COPA, row, characters) for row in rows]
    padded = collate(encodeds, 257)
    assert set(padded) == INPUTS | {"targets", "counted"}
    short, long = short.sequences[0], long.sequences[1]  # "<s>P because a b." and "<s>P because c def."
    assert padded["input_ids"].tolist() == [[*short[:-1], 257, 257], [*long[:-1]]]
    assert padded["position_ids"].tolist() == [[*range(14), 0, 0], [*range(16)]]
    assert padded["places"].tolist() == [[9, 10, 11, 12, 13, 0, 0], [*range(9, 16)]]
    assert padded["targets"].tolist() == [[IGNORED, IGNORED, *short[-5:]], [*long[-7:]]]
    assert padded["counted"].tolist() == [*range(2, 14)]

    packed = collate(encodeds, 257, packed=True, multiple_of=6)  # 30 tokens, or 2 * 18
    assert set(packed) == set(padded) | SHARED
    assert packed["input_ids"].tolist() == [[*short[:-1], *long[:-1]]]
    assert packed["position_ids"].tolist() == [[*range(14), *range(16)]]
    assert packed["branches"].tolist() == packed["trunks"].tolist() == [[0] * 14 + [1] * 16]
    assert torch.equal(packed["targets"], padded["targets"])
    for batch in (padded, packed):
        assert predicted(batch) == [*short[-6:-1], *long[-8:-1]]
        assert all(t.dtype == torch.int64 for t in batch.values())


def test_collate_candidates_of_several_tokens(characters):
    rows = [{"sentence": "fine", "label": 1}, {"sentence": "bad", "label": 0}]
    encodeds = [encode(SST2, row, characters) for row in rows]
    great = [IGNORED] * 3 + list(plain(characters, " great"))
    for packed in (False, True):
        batch = collate(encodeds, 257, packed=packed)
        assert set(batch) == INPUTS | {"targets", "counted", "members", "valid", "gold"} | (SHARED if packed else set())
        assert batch["gold"].tolist() == [1, 0] and batch["valid"].all()
        assert batch["members"].tolist() == [[0, 1], [2, 3]]
        assert batch["targets"][1].tolist() == great and batch["targets"][3].tolist() == great
        fed = [t for e in encodeds for s, n in zip(e.sequences, e.option_lengths, strict=True) for t in s[-n - 1 : -1]]
        assert predicted(batch) == fed
        # "<s>fine It was " once, with "terribl" and "grea": 24 tokens; in two rows of it or four of one each
        assert batch["input_ids"].shape == ((2, 24) if packed else (4, 24))


def test_collate_candidates_of_one_token(shared):
    # " great" (606) and " terrible" (1639) are single tokens of this one: one prompt a row, no targets
    rows = [{"sentence": "fine", "label": 1}, {"sentence": "bad", "label": 0}]
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "imdb-llama-6m")
    encodeds = [encode(SST2, row, tokenizer) for row in rows]
    for packed in (False, True):
        batch = collate(encodeds, 2, packed=packed, multiple_of=10)  # 5 + 5 tokens: one row of 10, or two
        assert set(batch) == INPUTS | {"candidates", "members", "valid", "gold"} | (SHARED if packed else set())
        assert batch["candidates"].tolist() == [606, 1639]
        assert batch["members"].tolist() == [[1, 0], [1, 0]]
        assert predicted(batch) == [tokenizer("fine It was")["input_ids"][-1]] * 2
        assert all(isinstance(v, torch.Tensor) for v in batch.values())


def test_unequal_numbers_of_candidates(characters):
    record = [RECORD_ROW, RECORD_ROW | {"entities": ["A", "B", "C"]}]
    batch = collate([encode(RECORD, row, characters) for row in record], 257, gold_only=False)
    assert batch["valid"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["members"].tolist() == [[0, 1, 0], [2, 3, 4]]
