"""Losses against the models' own `labels` loss, and one prompt pass against one forward per candidate."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from references import (
    ANSWERS,
    MODELS,
    SEVERAL,
    SINGLE,
    VOCABULARY,
    make,
    pretrained,
    read,
    reference_loss,
    rounding,
)
from torch import nn

from zo_finetuner.encoding import collate, encode_rows, pad_left
from zo_finetuner.isolation import can_pack
from zo_finetuner.objective import candidate_logits, candidate_scores, label_logits, training_loss
from zo_finetuner.rows import head_rows, output_head
from zo_finetuner.tasks import get_task

packed_or_padded = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
every_model = pytest.mark.parametrize(("name", "attention"), MODELS)


@packed_or_padded
@every_model
@torch.no_grad()
def test_language_model_loss_is_the_models_own(name, attention, packed):
    model = make(name, attention)
    total, tokens = 0.0, 0
    for encoded in ANSWERS:
        ids = torch.tensor([encoded.sequences[0]])
        labels = ids.clone()
        labels[:, : -encoded.option_lengths[0]] = -100
        total += model(input_ids=ids, labels=labels).loss * encoded.option_lengths[0]
        tokens += encoded.option_lengths[0]
    loss, weight = training_loss(model, collate(ANSWERS, 0, packed=packed))
    assert loss.dtype == weight.dtype == torch.float32 and loss.shape == weight.shape == ()
    assert weight == tokens == 7
    torch.testing.assert_close(loss, total, rtol=2e-6, atol=0)


@every_model
@torch.no_grad()
def test_the_models_own_loss_of_a_padded_batch(name, attention):
    """As its users call it: padded on the left, one mask, labels."""
    model = make(name, attention)
    padded = pad_left([e.sequences[0] for e in ANSWERS], 0)
    labels = torch.full_like(padded["input_ids"], -100)
    for row, encoded in zip(labels, ANSWERS, strict=True):
        row[-encoded.option_lengths[0] :] = torch.tensor(encoded.sequences[0][-encoded.option_lengths[0] :])
    own = model(**padded, labels=labels).loss
    loss, weight = training_loss(model, collate(ANSWERS, 0, packed=True))
    torch.testing.assert_close(loss / weight, own, rtol=2e-6, atol=0)


@packed_or_padded
@pytest.mark.parametrize("rows", [SINGLE, SEVERAL], ids=["one_prompt", "several_tokens"])
@every_model
@torch.no_grad()
def test_classification_loss(name, attention, rows, packed):
    model = make(name, attention)
    batch = collate(rows, 0, packed=packed)
    assert ("candidates" in batch) == (rows is SINGLE)
    loss, weight = training_loss(model, batch)
    assert weight == 3
    torch.testing.assert_close(loss, reference_loss(model, rows), rtol=0, atol=rounding(model, rows))


@packed_or_padded
@torch.no_grad()
def test_one_row_of_several_tokens_sends_the_batch_the_long_way(packed):
    model = make("Llama")
    batch = collate([*SINGLE, SEVERAL[0]], 0, packed=packed)
    assert "candidates" not in batch
    rows = [*SINGLE, SEVERAL[0]]
    expected, loss = reference_loss(model, rows), training_loss(model, batch)[0]
    torch.testing.assert_close(loss, expected, rtol=0, atol=rounding(model, rows))
    scores = candidate_scores(model, batch)
    assert scores.shape == (4, 3) and scores[:3, 2].isneginf().all()


@packed_or_padded
@torch.no_grad()
def test_real_sst2_rows(shared, packed):
    model, tokenizer = pretrained(shared, "imdb-llama-6m")
    rows = read(shared, "sst2", 16)
    encodeds = encode_rows(get_task("sst2"), rows, tokenizer)
    assert all(e.shares_prompt for e in encodeds)
    loss, weight = training_loss(model, collate(encodeds, tokenizer.pad_token_id, packed=packed))
    assert weight == 16
    torch.testing.assert_close(loss, reference_loss(model, encodeds), rtol=0, atol=rounding(model, encodeds))
    assert 0.5 < loss / weight < 1.5


@packed_or_padded
@pytest.mark.parametrize(
    "rows", [SINGLE * 3, SEVERAL * 3, ANSWERS * 3], ids=["one_prompt", "several_tokens", "answers"]
)
@torch.no_grad()
def test_any_split_of_a_window_gives_one_loss(rows, packed):
    model = make("Llama")

    def window(size):
        batches = [collate(rows[i : i + size], 0, packed=packed) for i in range(0, len(rows), size)]
        parts = [training_loss(model, batch) for batch in batches]
        return sum(loss for loss, _ in parts) / sum(weight for _, weight in parts)

    torch.testing.assert_close(window(1), window(9), rtol=1e-6, atol=0)
    torch.testing.assert_close(window(2), window(9), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [SINGLE, ANSWERS], ids=["one_prompt", "answers"])
@torch.no_grad()
def test_bf16_models_give_fp32_losses(rows):
    model = make("Llama").bfloat16()
    loss, weight = training_loss(model, collate(rows, 0))
    assert loss.dtype == weight.dtype == torch.float32
    assert loss != loss.bfloat16()  # rounded nowhere on the way


@contextlib.contextmanager
def head_shapes(model):
    """Shapes of everything the output head makes within the context."""
    shapes = []
    head = output_head(model)
    handle = head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    yield shapes
    handle.remove()


@torch.no_grad()
def test_logits_are_made_where_they_count_only():
    model = make("Llama")
    with head_shapes(model) as shapes:
        training_loss(model, collate(ANSWERS, 0))  # the longest answer has 4 tokens
        training_loss(model, collate(SEVERAL, 0))  # 9 sequences; the longest option has 3
        training_loss(model, collate(SINGLE, 0))  # 2 rows of the head
        training_loss(model, collate(ANSWERS, 0, packed=True))  # two rows, with 4 and 2 + 1 tokens
        training_loss(model, collate(SEVERAL, 0, packed=True))  # one row, 3 examples with 1 + 3 + 2 option tokens
        training_loss(model, collate(SINGLE, 0, packed=True))  # two rows, one with two prompts
    padded = [(3, 4, VOCABULARY), (9, 3, VOCABULARY), (3, 1, 2)]
    assert shapes == [*padded, (2, 4, VOCABULARY), (1, 18, VOCABULARY), (2, 2, 2)]
    assert candidate_logits(model, collate(SINGLE, 0), torch.tensor([7, 11, 3])).shape == (3, 3)


@torch.no_grad()
def test_a_prompt_is_computed_once():
    """Tokens that the model is fed: prompts of 5, 12 and 9, options of 1, 3 and 2 whose last is only a target."""
    model = make("Llama")
    fed = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: fed.append(args[0].numel()))
    training_loss(model, collate(SEVERAL, 0, packed=True, multiple_of=1))
    assert fed == [5 + 12 + 9 + 3 * (2 + 1)]


class Stub(nn.Module):
    """As small as a language model gets; it has no device of its own to wait for."""

    def __init__(self, tells_head=True):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.tells_head = tells_head
        self.config = transformers.PreTrainedConfig(attn_implementation="sdpa")

    def get_output_embeddings(self):
        return self.head if self.tells_head else None

    def forward(self, input_ids, attention_mask):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(self.embedding(input_ids)))


@packed_or_padded
@pytest.mark.parametrize("rows", [SINGLE, SEVERAL, ANSWERS], ids=["one_prompt", "several_tokens", "answers"])
@torch.no_grad()
def test_no_wait_for_the_host(rows, packed):
    """Meta tensors have no values: any .item(), .tolist(), boolean index or nonzero raises."""
    batch = {name: tensor.to("meta") for name, tensor in collate(rows, 0, packed=packed).items()}
    loss, weight = training_loss(Stub().to("meta"), batch)
    assert loss.device.type == "meta" and loss.shape == weight.shape == ()


@torch.no_grad()
def test_a_model_that_does_not_tell_its_head():
    """Its logits cover all positions; the labels' are taken from them."""
    model, silent = Stub(), Stub(tells_head=False)
    silent.load_state_dict(model.state_dict())
    for batch in (collate(SEVERAL, 0), collate(ANSWERS, 0)):
        assert torch.equal(label_logits(silent, batch), label_logits(model, batch))
    assert not model.head._forward_pre_hooks


@torch.no_grad()
def test_an_answer_kept_from_an_earlier_call():
    """Paired probing answers the second closure's calls of the model without running it."""
    model, answers = make("Llama"), []
    batch = collate(SEVERAL, 0, packed=True)
    hook = model.register_forward_hook(lambda module, args, output: answers.append(output))
    expected = label_logits(model, batch)
    hook.remove()
    model.forward = lambda **inputs: answers[0]
    assert torch.equal(label_logits(model, batch), expected)


# --- the head's rows


def untouched(head, before):
    hooks = len(head._forward_pre_hooks) + len(head._forward_hooks)
    return head.weight.data_ptr() == before and head.weight.shape[0] == VOCABULARY and hooks == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_the_head_comes_back_after_an_exception(error):
    model = make("Qwen2")  # tied: a swap left behind would break the embedding
    head, storage = model.lm_head, model.lm_head.weight.data_ptr()
    shapes = []

    def fail(hidden):
        shapes.append(head.weight.shape[0])
        raise error

    head.forward = fail
    with pytest.raises(error):
        training_loss(model, collate(SINGLE, 0))
    assert shapes == [2] and untouched(head, storage) and not hasattr(head, "_zo_rows")


@pytest.mark.parametrize("knows_rows", [True, False])
@torch.no_grad()
def test_inside_a_scratch_prober(knows_rows):
    """A prober that swaps the head first, rows only or whole, sees its weights used and its own undo
    stand."""
    model = make("Llama")
    head, storage = model.lm_head, model.lm_head.weight.data_ptr()
    moved = head.weight + 0.5 * torch.randn_like(head.weight)
    own = head.weight.data

    def swap_in(module, args):
        module.weight.data = moved[module._zo_rows] if knows_rows else moved

    def swap_out(module, args, output):
        module.weight.data = own

    handles = [
        head.register_forward_pre_hook(swap_in),
        head.register_forward_hook(swap_out, always_call=True),
    ]
    loss, _ = training_loss(model, collate(SINGLE, 0))
    for handle in handles:
        handle.remove()
    assert untouched(head, storage)
    head.weight.data = moved
    torch.testing.assert_close(loss, training_loss(model, collate(SINGLE, 0))[0], rtol=0, atol=rounding(model, SINGLE))


def test_gradients_flow_through_full_logits():
    model = make("Llama")
    training_loss(model, collate(SINGLE, 0))[0].backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    reference_loss(model, SINGLE).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_head_that_is_not_plain_falls_back():
    model = make("Llama")
    expected = training_loss(model, collate(SINGLE, 0))[0]
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", nn.Identity())
    with head_rows(model, torch.tensor([7, 11])) as only_rows:
        assert not only_rows and not hasattr(model.lm_head, "_zo_rows")
        assert label_logits(model, collate(SINGLE, 0)).shape == (3, VOCABULARY)
    loss = training_loss(model, collate(SINGLE, 0))[0]
    torch.testing.assert_close(loss, expected, rtol=0, atol=rounding(model, SINGLE))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["layers", "head"])
@torch.no_grad()
def test_lora(targets):
    peft = pytest.importorskip("peft")
    model = make("Llama")
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).eval()
    with head_rows(wrapped, torch.tensor([7, 11])) as only_rows:
        assert only_rows == ("lm_head" not in targets)
    assert can_pack(wrapped)
    for rows in (SINGLE, SEVERAL):
        for packed in (True, False):
            loss = training_loss(wrapped, collate(rows, 0, packed=packed))[0]
            torch.testing.assert_close(loss, reference_loss(wrapped, rows), rtol=0, atol=rounding(wrapped, rows))
    with head_shapes(wrapped) as shapes:
        training_loss(wrapped, collate(ANSWERS, 0))
    assert shapes == [(3, 4, VOCABULARY)]
