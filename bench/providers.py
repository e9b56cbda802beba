"""Who takes a step in the benchmark: our engine, bare inference, the published orders of operations.

    inference                two bare forwards of our own fast form of the batch: the floor of any two-point method
    zo_finetuner             our engine with MeZO
    zo_finetuner_learned     our engine with per-block networks (fresh ones: the time is the same)
    zo_finetuner_lozo        our engine with low-rank directions (LOZO): no pass over the weights; on a model of its
                             own, since a forward of anybody else merges what it has collected
    inference_graph          on a GPU: the two bare forwards as one CUDA graph
    zo_finetuner_graph       on a GPU: our engine with MeZO, whole steps as CUDA graphs
    reference_noise          the published sweeps over the weights around our one-prompt forward
    mezo_reference           MeZO's published order: every candidate a sequence, full logits, four sweeps
    zo_finetuner_reference   the published ZO Fine-tuner: besides, statistics and a network per tensor, one by one

mezo_reference over reference_noise is the work not done, reference_noise over zo_finetuner the kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.published import PublishedMeZO, PublishedZOFineTuner, option_loss
from zo_finetuner.encoding import Encoded
from zo_finetuner.engine import Engine
from zo_finetuner.graphs import CudaCapturer, Graph, GraphedSteps
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import make_method
from zo_finetuner.pertnn import PertNN
from zo_finetuner.phases import phase

EPS, LR, SEED = 1e-3, 1e-7, 0  # the rate leaves weights what they are


@dataclass
class Batch:
    """A batch as rows (the published form) and as our tensors on the device."""

    rows: list[Encoded]
    ours: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        """Of the rows as a user counts them: each with its correct option, once."""
        return sum(len(row.sequences[row.labels[0]]) for row in self.rows)


Step = Callable[[Batch], object]


@dataclass(frozen=True)
class Setup:
    """What a provider is made of.  probing: of our engine."""

    model: nn.Module
    pad_id: int
    batch_size: int
    probing: str

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss by our fast form of the batch."""
        total, weight = training_loss(self.model, batch.ours)
        return total / weight

    def published_loss(self, batch: Batch) -> Tensor:
        return option_loss(self.model, batch.rows, self.pad_id)


@dataclass(frozen=True)
class Provider:
    """make: the step of a model.  moves: whether it gives the parameters new memory at every sweep, as the published
    code does; no engine of ours can live on that model then.  collects: updates that a forward of others would merge,
    so it needs a model of its own, and probes in one way.  optimizer: what `zo plan` calls it, if it knows it.
    graphs: only on a GPU, and a batch is a replay from its third step on."""

    make: Callable[[Setup], Step]
    moves: bool = False
    collects: bool = False
    optimizer: str = ""
    graphs: bool = False


def _inference(setup: Setup) -> Step:
    @torch.no_grad()
    def step(batch: Batch) -> None:
        for _ in range(2):
            with phase("forward"):
                setup.loss(batch)

    return step


def _engine(optimizer: str) -> Callable[[Setup], Step]:
    def make(setup: Setup) -> Step:
        method = make_method(optimizer, setup.model, batch_size=setup.batch_size)
        engine = Engine(setup.model, method, eps=EPS, seed=SEED, probing=setup.probing)
        return lambda batch: engine.step(lambda: setup.loss(batch), LR)

    return make


def _lozo(setup: Setup) -> Step:
    engine = Engine(setup.model, make_method("lozo", setup.model), eps=EPS, seed=SEED)
    return lambda batch: engine.step(lambda: setup.loss(batch), LR)


def _inference_graph(setup: Setup) -> Step:
    capturer = CudaCapturer(next(setup.model.parameters()).device)
    graphs: dict[int, Graph] = {}

    @torch.no_grad()
    def both(batch: Batch) -> Tensor:
        return setup.loss(batch) + setup.loss(batch)

    def step(batch: Batch) -> None:
        if id(batch) not in graphs:
            both(batch)
            graphs[id(batch)] = capturer.capture(lambda: both(batch))[0]
        graphs[id(batch)].replay()

    return step


def _graphs(optimizer: str) -> Callable[[Setup], Step]:
    def make(setup: Setup) -> Step:
        method = make_method(optimizer, setup.model, batch_size=setup.batch_size)
        steps = GraphedSteps(Engine(setup.model, method, eps=EPS, seed=SEED, probing=setup.probing))

        def loss_of(ours: dict[str, Tensor]) -> Tensor:
            total, weight = training_loss(setup.model, ours)
            return total / weight

        return lambda batch: steps.step(loss_of, batch.ours, LR)

    return make


def _published(loss: Callable[[Setup, Batch], Tensor]) -> Callable[[Setup], Step]:
    def make(setup: Setup) -> Step:
        seeds, order = itertools.count(), PublishedMeZO(setup.model, lr=LR, eps=EPS)
        return lambda batch: order.step(lambda: loss(setup, batch), next(seeds))

    return make


def _published_nets(setup: Setup) -> Step:
    names = [name for name, p in setup.model.named_parameters() if p.requires_grad]
    nets = PertNN.fresh(names).to(next(setup.model.parameters()).device)
    order = PublishedZOFineTuner(setup.model, nets, batch_size=setup.batch_size, lr=LR, eps=EPS)
    seeds = itertools.count()
    return lambda batch: order.step(lambda: setup.published_loss(batch), next(seeds))


#: Those that move weights stand last: what is measured in turn on one model is measured in this order.
PROVIDERS = {
    "inference": Provider(_inference),
    "zo_finetuner": Provider(_engine("mezo"), optimizer="mezo"),
    "zo_finetuner_learned": Provider(_engine("zo-finetuner"), optimizer="zo-finetuner"),
    "zo_finetuner_lozo": Provider(_lozo, collects=True, optimizer="lozo"),
    "inference_graph": Provider(_inference_graph, graphs=True),
    "zo_finetuner_graph": Provider(_graphs("mezo"), graphs=True),
    "reference_noise": Provider(_published(Setup.loss), moves=True),
    "mezo_reference": Provider(_published(Setup.published_loss), moves=True),
    "zo_finetuner_reference": Provider(_published_nets, moves=True),
}
