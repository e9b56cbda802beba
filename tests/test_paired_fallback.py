"""What cannot be paired takes two forwards, says why, and keeps its losses; nothing is silently wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import transformers
from models import tiny, tokens
from noted import Noted
from references import COMMON
from test_paired import EPS, LR, run
from torch import nn

from zo_finetuner.engine import Engine
from zo_finetuner.optim import MeZO
from zo_finetuner.optim.base import Probe

IDS = torch.arange(12).view(3, 4)


class Model(nn.Module):
    """Embedding, a block under test, output."""

    def __init__(self, block: Callable[[], nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block, self.out = nn.Embedding(16, 8), block(), nn.Linear(8, 5)

    def forward(self, ids):
        return self.out(self.block(self.embed(ids)))


class Routed(nn.Module):
    """One nn.Linear per expert: each is given the tokens that chose it, of + and of - together."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        flat = x.reshape(-1, 8)
        out, chosen = torch.zeros_like(flat), (flat[:, 0] > 0.5).long()
        for i, expert in enumerate(self.experts):
            out[chosen == i] = expert(flat[chosen == i])
        return out.view(x.shape)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class FirstToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x[0, 0])


class FirstRow(nn.Module):
    """One row stands for all, and it is one of the + half."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x[:1])


class TimeFirst(nn.Module):
    """Rows and positions change places: dimension 0 of the linear layer is not the batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


def mean_square(model):
    return model(IDS).square().mean()


def assert_two_forwards(build, loss_fn, reason, caplog):
    """The losses of scratch probing to the bit, and a line of the log that gives the reason once."""
    alone, _ = run("scratch", build(), loss_fn)
    paired, engine = run("paired", build(), loss_fn)
    assert torch.equal(alone, paired)
    assert not engine.probing._trusted
    lines = [record.getMessage() for record in caplog.records if "take a forward each" in record.getMessage()]
    assert len(lines) == 1 and reason in lines[0], lines


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Routed, "block.experts.0 (Linear) a tensor of shape"),
        (Centred, "block (Centred) mixes the rows of a batch"),
        (FirstToken, "block.inner (Linear) a tensor of shape (8,)"),
        (FirstRow, "block.inner (Linear) mixes the rows of a batch"),
        (TimeFirst, "block.linear (Linear) a tensor of shape (4, 6, 8) in a batch of 6 x 4"),
    ],
)
def test_modules_that_do_not_keep_the_halves_apart(block, reason, caplog):
    assert_two_forwards(lambda: Model(block), mean_square, reason, caplog)


def test_as_many_positions_as_rows_of_the_doubled_batch(caplog):
    """TimeFirst would pass for a batch here: NaN weights of one half show that its rows are positions."""
    ids = torch.arange(16).view(2, 8)[:, :4]  # 2B = T = 4
    loss = lambda model: model(ids).square().mean()  # noqa: E731
    assert_two_forwards(lambda: Model(TimeFirst), loss, "block.linear (Linear) mixes the rows of a batch", caplog)


def test_a_model_that_owns_weights_itself(caplog):
    class Own(Model):
        def __init__(self):
            super().__init__(nn.Identity)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, ids):
            return self.out(self.block(self.embed(ids)) * self.scale)

    assert_two_forwards(Own, mean_square, "belong to the model itself", caplog)


def test_a_hook_that_takes_something_from_inside(caplog):
    def loss(model):
        taken = []
        handle = model.embed.register_forward_hook(lambda module, args, output: taken.append(output))
        model(IDS)
        handle.remove()
        return taken[0].square().mean()

    # for + it sees both halves, for - the model is not run and there is nothing to take
    assert_two_forwards(lambda: Model(nn.Identity), loss, "takes other members from inside the model", caplog)


def test_a_call_with_a_cache_takes_two_forwards(caplog):
    ids = tokens()

    def loss(model):
        first = model(input_ids=ids[:, :5], use_cache=True)
        return model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=False).logits.std()

    alone, _ = run("scratch", tiny("llama"), loss)
    paired, engine = run("paired", tiny("llama"), loss)
    assert torch.equal(alone, paired) and engine.probing.reason == ""
    assert "use_cache=True" in caplog.text and "past_key_values is a DynamicCache" in caplog.text


def test_an_objective_that_generates(caplog):
    """Its calls have caches; they take two forwards."""
    ids = tokens(2, 6)

    def reward(model):
        settings = dict(max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True)
        answer = model.generate(ids, **settings)
        return torch.stack(answer.scores).float().std()

    alone, _ = run("scratch", tiny("llama"), reward)
    paired, _ = run("paired", tiny("llama"), reward)
    assert torch.equal(alone, paired) and "a forward each" in caplog.text


def test_calls_that_can_be_paired_are_beside_those_that_cannot(caplog):
    ids, forwards = tokens(), []

    def loss(model):
        first = model(input_ids=ids, use_cache=True).logits.std()
        return first + model(input_ids=ids, labels=ids).loss + model.get_input_embeddings()(ids).std()

    alone, _ = run("scratch", tiny("llama"), loss)
    model = tiny("llama")
    model.model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
    paired, engine = run("paired", model, loss, steps=3)
    assert torch.equal(alone, paired) and engine.probing._trusted
    assert len(forwards) == 4 + 5 + 2 * 3  # two forwards each; the rehearsal: 2 for + beside -, 3 for both; then 3


@pytest.mark.parametrize("change", ["another batch", "written in place", "another argument", "another number of calls"])
def test_other_inputs_for_minus_are_computed(change, caplog):
    def losses(mode):
        ids, count = tokens(2, 8), iter(range(100))

        def loss(model):
            call, batch = next(count), ids
            if call >= 5:  # after the first step, whose closures are five
                if change == "another batch":
                    batch = tokens(2, 8, seed=call)
                elif change == "written in place":
                    ids[0, call] = 5 + call
                elif change == "another number of calls" and call % 2 == 0:
                    return model(input_ids=tokens(2, 8), labels=ids).loss + model(input_ids=ids, labels=ids).loss
            extra = {"logits_to_keep": call % 2} if change == "another argument" and call >= 5 else {}
            return model(input_ids=batch, **extra).logits.float().square().mean()

        model = tiny("llama")
        engine = Engine(model, Noted(), eps=EPS, probing=mode)
        for _ in range(2):
            engine.step(lambda: loss(model), 0.0)
            if mode == "scratch":
                while next(count) < 4:  # the closures of the rehearsal
                    pass
        return torch.cat(engine.method.told)

    assert torch.equal(losses("paired"), losses("scratch"))
    assert "other inputs for - than it gave for +" in caplog.text


def test_mirrored_coefficients_are_asked_for(caplog):
    class OneSided(Noted):
        def ask(self, context):
            plus, _ = super().ask(context)
            return [plus, Probe(plus.direction, 2 * plus.coef)]

    model, ids = tiny("llama"), tokens()
    engine = Engine(model, OneSided(), eps=EPS, probing="paired")
    engine.step(lambda: model(input_ids=ids, labels=ids).loss, 0.0)
    assert engine.probing.reason == "two probes along a direction are not +c and -c"


def test_coefficients_that_stop_being_mirrored_skip_the_step():
    """Found on the device, without a wait."""

    class Turns(MeZO):
        def ask(self, context):
            plus, minus = super().ask(context)
            return [plus, Probe(plus.direction, minus.coef * (2 if context.step == 2 else 1))]

    model, ids = tiny("llama"), tokens()
    engine = Engine(model, Turns(), eps=EPS, probing="paired")
    losses = [engine.step(lambda: model(input_ids=ids, labels=ids).loss, 0.0) for _ in range(4)]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True]
    assert engine.metrics()["skipped_steps"] == 1


def test_a_first_step_without_finite_losses_is_rehearsed_later():
    model, ids, calls = tiny("llama"), tokens(), []

    def loss():
        calls.append(1)
        value = model(input_ids=ids, labels=ids).loss
        return value * math.nan if len(calls) <= 2 else value

    engine = Engine(model, MeZO(), eps=EPS, probing="paired")
    counts = []
    for _ in range(3):
        engine.step(loss, 0.0)
        counts.append(len(calls))
    assert counts == [2, 2 + 5, 2 + 5 + 2] and engine.probing._trusted


def test_a_closure_without_a_model_call_is_not_rehearsed():
    model, values = tiny("llama"), iter(range(100))
    engine = Engine(model, MeZO(), probing="paired")
    for _ in range(3):
        engine.step(lambda: float(next(values)), 0.0)
    assert next(values) == 6


def test_the_reason_outlives_a_resume():
    model = Model(Centred)
    engine = Engine(model, MeZO(), eps=EPS, probing="paired")
    engine.step(lambda: mean_square(model), LR)
    again = Engine(Model(Centred), MeZO(), probing="paired")
    again.load_state_dict(engine.state_dict())
    assert again.probing.reason == engine.probing.reason != ""


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe"])
def test_experts_that_are_one_module_are_paired(kind):
    """transformers keeps a layer's experts in one module, which routes within the half that it is given."""
    settings = COMMON | {"num_key_value_heads": 2, "intermediate_size": 32, "moe_intermediate_size": 16}
    settings |= {"num_local_experts": 4, "num_experts": 4, "shared_expert_intermediate_size": 16}
    ids = tokens(3, 9)

    def build():
        torch.manual_seed(1)
        config = getattr(transformers, f"{kind}Config")(**settings)
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()

    loss = lambda model: model(input_ids=ids, labels=ids).loss  # noqa: E731
    alone, _ = run("scratch", build(), loss)
    paired, engine = run("paired", build(), loss)
    assert engine.probing.reason == "" and torch.equal(alone, paired)


def test_a_loss_over_all_rows_takes_two_forwards(caplog):
    """Mixtral's balance of experts is one number for the batch."""
    settings = COMMON | {"num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 4}
    ids = tokens(3, 9)

    def build():
        torch.manual_seed(1)
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings)).eval()

    def loss(model):
        return model(input_ids=ids, labels=ids, output_router_logits=True).loss

    assert_two_forwards(build, loss, "the model returns a tensor of shape ()", caplog)
