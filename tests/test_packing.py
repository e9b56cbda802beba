"""Packed rows: what is laid out where, what each token sees, and hidden states equal to those of a sequence alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
import re
import warnings

import pytest
import torch
import transformers
from references import ANSWERS, MODELS, SEVERAL, SINGLE, VOCABULARY, make, reference_loss, rounding
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import AutoTokenizer, masking_utils

from zo_finetuner import slices
from zo_finetuner.data import load_splits
from zo_finetuner.encoding import collate, encode_rows
from zo_finetuner.isolation import can_pack
from zo_finetuner.masks import positions_as_given, visible
from zo_finetuner.objective import label_logits, training_loss
from zo_finetuner.packing import LONGEST_TREE, Document, fill_few_shapes, fill_rows, grow, lay_out
from zo_finetuner.rows import output_head
from zo_finetuner.tasks import get_task


def tokens(count, seed=0):
    return tuple(torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def paths(document):
    return [document.trunk + branch for branch in document.branches or ((),)]


# Sizes 7, 27, 1, 5, 20: two rows, one of them with a shorter document behind a branched one.
DOCUMENTS = [
    Document(tokens(7, 1)),
    Document(tokens(11, 2), (tokens(5, 3), tokens(2, 4), (), tokens(9, 5))),
    Document(tokens(1, 6)),
    Document(tokens(3, 7), (tokens(1, 8), tokens(1, 9))),
    Document(tokens(20, 10)),
]
# Every token of every path: trunks as often as they have branches.
LABELS = [(i, path, k) for i, d in enumerate(DOCUMENTS) for path, end in enumerate(d.ends) for k in range(end)]


# --- documents


def test_a_document_shares_what_its_sequences_begin_with():
    sequences = [(1, 2, 3, 4), (1, 2, 5), (1, 2, 3, 9, 9), (1, 2)]
    (document,) = grow(sequences)
    assert document.trunk == (1, 2) and paths(document) == sequences and len(document) == 2 + 2 + 1 + 3
    assert document.ends == [4, 3, 5, 2]
    flat = [*document.trunk, *itertools.chain(*document.branches)]
    for path, sequence in enumerate(sequences):
        assert [flat[document.offset(path, k)] for k in range(len(sequence))] == list(sequence)


def test_nothing_shared_and_all_shared():
    assert grow([(1, 2), (3, 4)]) == [Document((), ((1, 2), (3, 4)))]
    assert grow([(1, 2), (1, 2)]) == [Document((1, 2), ((), ()))]
    assert grow([(1, 2)]) == [Document((1, 2), ((),))]


def test_a_document_too_long_is_divided():
    trunk = tokens(10)
    sequences = [trunk + (i, i) for i in range(7)]
    documents = grow(sequences, longest=14)
    assert [len(d) for d in documents] == [14, 14, 14, 12]
    assert [path for d in documents for path in paths(d)] == sequences
    long = [(1,) * (LONGEST_TREE + 1), (2,) * 3]
    assert [paths(d) for d in grow(long)] == [[long[0]], [long[1]]]


# --- rows


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_document_once(seed):
    draw = random.Random(seed)
    sizes = [draw.randint(1, draw.choice([20, 1000])) for _ in range(draw.randint(1, 40))]
    rows = fill_rows(sizes, 8)
    assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
    length = -(-max(sum(sizes[i] for i in row) for row in rows) // 8) * 8
    longest = -(-max(sizes) // 8) * 8
    assert len(rows) * length <= len(sizes) * longest  # never more tokens than padded


def test_rows_of_equal_documents_do_not_share():
    """Sharing would save nothing and cost the kernels without a mask."""
    assert fill_rows([1024] * 8) == [[i] for i in range(8)]


def padding(batch, encodeds):
    """Tokens of the batch that are none of the fed sequences', and all of its tokens."""
    fed = sum(len(e.sequences[e.labels[0]]) - 1 for e in encodeds)
    return batch["input_ids"].numel() - fed, batch["input_ids"].numel()


@pytest.mark.parametrize("name", ["sst2", "drop"])
def test_padding_is_under_a_twentieth(shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "imdb-llama-6m")
    lines = (shared / "data" / name / "train.jsonl").read_text(encoding="utf-8").splitlines()[:960]
    encodeds = encode_rows(get_task(name), map(json.loads, lines), tokenizer)
    totals = {True: [0, 0], False: [0, 0]}
    for start in range(0, len(encodeds), 16):
        for packed in totals:
            batch = collate(encodeds[start : start + 16], 2, packed=packed)
            counts = padding(batch, encodeds[start : start + 16])
            totals[packed] = [a + b for a, b in zip(totals[packed], counts, strict=True)]
    share = {packed: pad / total for packed, (pad, total) in totals.items()}
    assert share[True] < 0.05 and share[False] > 0.4


def test_a_batch_says_which_token_sees_which():
    """What the place of a label sees, in order of position, is its path up to there: every token of it once."""
    rows = fill_rows([len(d) for d in DOCUMENTS])
    assert [sorted(row) for row in rows] == rows and len(rows) == 2
    batch = lay_out(DOCUMENTS, rows, LABELS, 0)
    seen = visible(batch)
    width = batch["places"].shape[1]
    assert batch["chosen"].shape == (len(LABELS),)
    for (i, path, k), chosen in zip(LABELS, batch["chosen"].tolist(), strict=True):
        row, place = chosen // width, batch["places"].flatten()[chosen]
        keys = seen[row, place].nonzero().flatten()
        assert batch["position_ids"][row, keys].sort().values.tolist() == list(range(k + 1))
        order = batch["position_ids"][row, keys].argsort()
        assert tuple(batch["input_ids"][row, keys[order]].tolist()) == paths(DOCUMENTS[i])[path][: k + 1]
    padding = batch["branches"] < 0
    assert padding.any() and not seen[padding[:, None].expand_as(seen) & ~padding[..., None]].any()
    assert seen.any(-1).all()  # a token that sees nothing is NaN


def test_rows_of_one_sequence_need_no_mask():
    batch = collate(SINGLE[:1], 0, packed=True)
    assert "branches" not in batch and "trunks" not in batch
    assert "branches" in collate(SEVERAL[:1], 0, packed=True)  # one example, but its candidates share a row
    assert "branches" not in collate(SEVERAL, 0)


# --- models


def states(model, batch):
    """What the output head is given, at the labels."""
    given = []
    hook = output_head(model).register_forward_hook(lambda module, args, output: given.append(args[0]))
    label_logits(model, batch)
    hook.remove()
    return given[0].flatten(0, 1)[batch["chosen"]]


@pytest.mark.parametrize(("name", "attention"), MODELS)
@torch.no_grad()
def test_hidden_states_are_those_of_a_sequence_alone(name, attention):
    """fp32.  Attention scores reach 40 (weights of .3), where numbers are 4e-6 apart: a sum in another order moves a
    softmax by that much in each of two layers.  A wrong mask or position moves states by .1 and more."""
    model = make(name, attention)
    assert can_pack(model)
    batch = lay_out(DOCUMENTS, fill_rows([len(d) for d in DOCUMENTS]), LABELS, 0)
    alone = []
    for sequence in itertools.chain(*map(paths, DOCUMENTS)):
        every = [(0, 0, k) for k in range(len(sequence))]
        alone.append(states(model, lay_out([Document(sequence)], [[0]], every, 0, multiple_of=1)))
    alone = torch.cat(alone)
    error = (states(model, batch) - alone).norm(dim=1) / alone.norm(dim=1)
    assert error.max() < 1e-5


@contextlib.contextmanager
def doubled(model):
    """Rows repeated behind one another inside the model call, as paired probing does it."""

    def double(module, args, kwargs):
        return args, tree_map(lambda x: torch.cat([x, x]) if torch.is_tensor(x) else x, kwargs)

    hook = model.register_forward_pre_hook(double, with_kwargs=True)
    yield
    hook.remove()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(("name", "attention"), MODELS)
@torch.no_grad()
def test_a_batch_doubled_inside_the_call(name, attention, packed):
    """The head is given both halves' labels, and each half is the batch's (another batch size: sums in another order,
    see the error budget above; logits reach 30)."""
    model = make(name, attention)
    batch = collate(SEVERAL, 0, packed=packed)
    expected = label_logits(model, batch)
    rows, width = batch["places"].shape
    outputs = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    with doubled(model):
        label_logits(model, batch)
    hook.remove()
    (logits,) = outputs
    assert logits.shape == (2 * rows, width, VOCABULARY)
    for half in logits.split(rows):
        torch.testing.assert_close(half.flatten(0, 1)[batch["chosen"]], expected, rtol=0, atol=3e-4)


class Waits(TorchDispatchMode):
    """Fails at operators whose result the host has to wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        if name.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "attention"), MODELS)
@torch.no_grad()
def test_no_forward_waits_for_the_host(name, attention):
    model = make(name, attention)
    for rows, packed in itertools.product((SINGLE, SEVERAL, ANSWERS, ANSWERS[:1]), (True, False)):
        batch = collate(rows, 0, packed=packed, multiple_of=1)
        with Waits():
            training_loss(model, batch)
    if name != "OPT":  # the control: transformers on its own; OPT does not look for packed sequences
        with pytest.raises(AssertionError, match="_local_scalar_dense waits"), Waits():
            model(batch["input_ids"], use_cache=False)


def test_transformers_is_left_as_it_is():
    own = masking_utils.find_packed_sequence_indices
    with pytest.raises(KeyboardInterrupt), positions_as_given():
        assert masking_utils.find_packed_sequence_indices is not own
        with positions_as_given():
            pass
        raise KeyboardInterrupt
    assert masking_utils.find_packed_sequence_indices is own


# --- models that cannot


class Blind(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


class Counting(transformers.GPT2LMHeadModel):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


class Refusing(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if attention_mask is not None:
            raise NotImplementedError("a mask of four dimensions\nis too many")
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


def subclassed(kind, name):
    model = make(name)
    other = kind(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def bloom():
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    torch.manual_seed(1)
    return transformers.BloomForCausalLM(config).eval()


def mamba():
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, initializer_range=0.3
    )
    torch.manual_seed(1)
    return transformers.MambaForCausalLM(config).eval()


def chunked():
    config = make("Llama").config.to_dict() | {"attention_chunk_size": 4, "head_dim": 8, "num_local_experts": 2}
    torch.manual_seed(1)
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**config)).eval()


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: subclassed(Blind, "Llama"), "Blind: .* its forward does not keep them apart"),
        (lambda: subclassed(Counting, "GPT2"), "Counting: .* its forward does not keep them apart"),
        (lambda: subclassed(Refusing, "Llama"), "Refusing: .* NotImplementedError: a mask of four dimensions$"),
        (bloom, "BloomForCausalLM: .* takes no position_ids"),
        (mamba, "MambaForCausalLM: .* takes no position_ids"),
        (chunked, "Llama4ForCausalLM: .* layers of chunked_attention"),
    ],
    ids=["blind to masks", "blind to positions", "refuses", "alibi", "state space", "chunks"],
)
def test_a_model_that_cannot_is_named_once_and_padded(build, reason, caplog):
    model = build().train()
    with caplog.at_level(logging.WARNING, "zo_finetuner"):
        assert not can_pack(model) and not can_pack(model)
    (record,) = [r for r in caplog.records if r.name == "zo_finetuner.isolation"]
    assert re.search(reason, record.getMessage())
    assert model.training
    model.eval()
    for rows in (SINGLE, SEVERAL):
        loss = training_loss(model, collate(rows, 0, packed=can_pack(model)))[0]
        torch.testing.assert_close(loss, reference_loss(model, rows), rtol=0, atol=rounding(model, rows))


@torch.no_grad()
def test_a_model_is_tried_once_per_attention():
    model = make("Llama")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert can_pack(model) and can_pack(model) and len(calls) == 3
    model.config._attn_implementation = "eager"
    assert can_pack(model) and len(calls) == 6
    model.config._attn_implementation = "flash_attention_2"
    assert not can_pack(model) and len(calls) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["imdb-llama-6m", "stories260k-llama", "tinystories-bitnet-3.3m"])
def test_rounding_is_no_reason(shared, name, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(shared / "models" / name, dtype=dtype)
    assert can_pack(model)


# --- few shapes, for graphs of whole steps


def shapes(batch):
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(batch.items()))


# Measured: 26, 39 and 55 shapes, .021, .025 and .039 padding; without, 54, 92 and 200 shapes.
@pytest.mark.parametrize(("name", "most", "padding"), [("sst2", 30, 0.03), ("boolq", 45, 0.03), ("drop", 60, 0.045)])
def test_batches_of_real_rows_have_few_shapes_and_little_padding(shared, name, most, padding):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "imdb-llama-6m")
    rows = load_splits(get_task(name), str(shared / "data" / name), num_train=1000, num_dev=1, num_eval=1).train
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows are cut
        encoded = encode_rows(get_task(name), rows, tokenizer, 512)
    order = random.Random(0)
    fed = [collate(order.sample(encoded, 16), 0, packed=True, few_shapes=True) for _ in range(200)]
    assert len(set(map(shapes, fed))) <= most
    rest = sum(int((batch["branches"] < 0).sum()) for batch in fed if "branches" in batch)
    assert rest / sum(batch["input_ids"].numel() for batch in fed) <= padding


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [SINGLE, SEVERAL, ANSWERS], ids=["single", "several", "answers"])
def test_few_shapes_have_the_same_loss(kind, packed, sliced, monkeypatch):
    """Also where the head is read in slices of its rows."""
    if sliced:
        monkeypatch.setattr(slices, "LEAST", 0)
    model = make("Llama", intermediate_size=32)
    assert bool(slices.slicing(model).rows) == sliced
    exact, padded = (collate(kind, 0, packed=packed, few_shapes=few) for few in (False, True))
    with torch.no_grad():
        (loss, weight), (same, count) = (training_loss(model, batch) for batch in (exact, padded))
    assert count == weight and same.item() == pytest.approx(loss.item(), rel=2e-6)
    assert padded["chosen"].numel() > exact["chosen"].numel() and padded["places"].shape[1] == 32


def test_few_shapes_take_the_fewest_rows_that_cost_little():
    assert fill_few_shapes([40] * 4) == [[0, 1, 2, 3]]  # 160 tokens: one row costs 3 % more than two
    assert len(fill_few_shapes([500] * 16)) == 16  # eight rows of 1,024 would cost 11 % more
    rows = fill_few_shapes([7, 30, 12, 90, 61, 5])
    assert sorted(i for row in rows for i in row) == [0, 1, 2, 3, 4, 5]
