"""Losses against the models' own `labels` loss, and one prompt pass against one forward per candidate."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from references import (
    ANSWERS,
    CONFIGS,
    SEVERAL,
    SINGLE,
    VOCABULARY,
    make,
    pretrained,
    read,
    reference_loss,
)
from torch import nn

from zo_finetuner.encoding import collate, encode_rows
from zo_finetuner.objective import candidate_logits, candidate_scores, last_logits, training_loss
from zo_finetuner.rows import head_rows, output_head
from zo_finetuner.tasks import get_task


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_language_model_loss_is_the_models_own(name):
    model = make(name)
    total, tokens = 0.0, 0
    for encoded in ANSWERS:
        ids = torch.tensor([encoded.sequences[0]])
        labels = ids.clone()
        labels[:, : -encoded.option_lengths[0]] = -100
        total += model(input_ids=ids, labels=labels).loss * encoded.option_lengths[0]
        tokens += encoded.option_lengths[0]
    loss, weight = training_loss(model, collate(ANSWERS, 0))
    assert loss.dtype == weight.dtype == torch.float32 and loss.shape == weight.shape == ()
    assert weight == tokens == 7
    torch.testing.assert_close(loss, total, rtol=2e-6, atol=0)

    # The padded batch at once, as the model's own loss sees it.
    batch = collate(ANSWERS, 0)
    ids = torch.cat([batch["input_ids"], torch.tensor([[e.sequences[0][-1]] for e in ANSWERS])], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = batch["targets"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    own = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels).loss
    torch.testing.assert_close(loss / weight, own, rtol=2e-6, atol=0)


@pytest.mark.parametrize("rows", [SINGLE, SEVERAL], ids=["one_prompt", "per_candidate"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_classification_loss(name, rows):
    model = make(name)
    batch = collate(rows, 0)
    assert ("candidates" in batch) == (rows is SINGLE)
    loss, weight = training_loss(model, batch)
    assert weight == 3
    torch.testing.assert_close(loss, reference_loss(model, rows), rtol=1e-6, atol=0)


@torch.no_grad()
def test_one_row_of_several_tokens_sends_the_batch_the_long_way():
    model = make("Llama")
    batch = collate([*SINGLE, SEVERAL[0]], 0)
    assert "candidates" not in batch
    expected = reference_loss(model, [*SINGLE, SEVERAL[0]])
    torch.testing.assert_close(training_loss(model, batch)[0], expected, rtol=1e-6, atol=0)
    scores = candidate_scores(model, batch)
    assert scores.shape == (4, 3) and scores[:3, 2].isneginf().all()


@torch.no_grad()
def test_real_sst2_rows(shared):
    model, tokenizer = pretrained(shared, "imdb-llama-6m")
    rows = read(shared, "sst2", 16)
    encodeds = encode_rows(get_task("sst2"), rows, tokenizer)
    assert all(e.shares_prompt for e in encodeds)
    loss, weight = training_loss(model, collate(encodeds, tokenizer.pad_token_id))
    assert weight == 16
    torch.testing.assert_close(loss, reference_loss(model, encodeds), rtol=1e-6, atol=0)
    assert 0.5 < loss / weight < 1.5


@pytest.mark.parametrize(
    "rows", [SINGLE * 3, SEVERAL * 3, ANSWERS * 3], ids=["one_prompt", "per_candidate", "answers"]
)
@torch.no_grad()
def test_any_split_of_a_window_gives_one_loss(rows):
    model = make("Llama")

    def window(size):
        parts = [training_loss(model, collate(rows[i : i + size], 0)) for i in range(0, len(rows), size)]
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
    assert shapes == [(3, 4, VOCABULARY), (9, 3, VOCABULARY), (3, 1, 2)]
    assert candidate_logits(model, collate(SINGLE, 0), torch.tensor([7, 11, 3])).shape == (3, 3)


class Stub(nn.Module):
    """As small as a language model gets; it has no device of its own to wait for."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, logits_to_keep=0):
        hidden = self.embedding(input_ids)[:, -logits_to_keep:]
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(hidden))


@pytest.mark.parametrize("rows", [SINGLE, SEVERAL, ANSWERS], ids=["one_prompt", "per_candidate", "answers"])
@torch.no_grad()
def test_no_wait_for_the_host(rows):
    """Meta tensors have no values: any .item(), .tolist(), boolean index or nonzero raises."""
    batch = {name: tensor.to("meta") for name, tensor in collate(rows, 0).items()}
    loss, weight = training_loss(Stub().to("meta"), batch)
    assert loss.device.type == "meta" and loss.shape == weight.shape == ()


class NoKeep(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None):
        return super().forward(input_ids, attention_mask, position_ids)


@torch.no_grad()
def test_a_forward_without_logits_to_keep():
    model = make("Llama")
    old = NoKeep(model.config).eval()
    old.load_state_dict(model.state_dict())
    for rows in (SINGLE, SEVERAL, ANSWERS):
        batch = collate(rows, 0)
        with head_shapes(old) as shapes:
            loss, _ = training_loss(old, batch)
        with head_shapes(model) as expected:
            assert torch.equal(loss, training_loss(model, batch)[0])
        assert shapes == expected
    assert not old.lm_head._forward_pre_hooks


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
    torch.testing.assert_close(loss, training_loss(model, collate(SINGLE, 0))[0], rtol=1e-6, atol=0)


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
        assert last_logits(model, collate(SINGLE, 0), 1).shape == (3, 1, VOCABULARY)
    torch.testing.assert_close(training_loss(model, collate(SINGLE, 0))[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["layers", "head"])
@torch.no_grad()
def test_lora(targets):
    peft = pytest.importorskip("peft")
    model = make("Llama")
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).eval()
    with head_rows(wrapped, torch.tensor([7, 11])) as only_rows:
        assert only_rows == ("lm_head" not in targets)
    for rows in (SINGLE, SEVERAL):
        loss = training_loss(wrapped, collate(rows, 0))[0]
        torch.testing.assert_close(loss, reference_loss(wrapped, rows), rtol=1e-6, atol=0)
    with head_shapes(wrapped) as shapes:
        training_loss(wrapped, collate(ANSWERS, 0))
    assert shapes == [(3, 4, VOCABULARY)]
