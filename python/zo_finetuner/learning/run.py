"""The job of `zo learn`: settings -> learning sets -> learned -> OUT/learned.safetensors with its card.

Everything that can be wrong with the input is found before the output folder is made.  OUT holds afterwards
state.safetensors (to resume), log.jsonl (every step's loss), scales.png, learned.safetensors and last result.json.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.cards import RECIPES, Card, fingerprint
from zo_finetuner.encoding import pad_token
from zo_finetuner.files import make_folder, write_json, write_text
from zo_finetuner.learning.checkpoint import LEARNED, LOG, PICTURE, RESULT, STATE, restore, save_state, saved_state
from zo_finetuner.learning.closed_form import closed_form_sigma
from zo_finetuner.learning.improved import RATE
from zo_finetuner.learning.learner import Learner
from zo_finetuner.learning.settings import LearnSettings
from zo_finetuner.learning.show import draw_scales
from zo_finetuner.learning.sources import LearningSet, task_set, text_set
from zo_finetuner.loading import load_model
from zo_finetuner.pertnn import PertNN
from zo_finetuner.pertnn_io import save_pertnn
from zo_finetuner.scale_net import ScaleNet
from zo_kernels import NOISE_VERSION

TEXT_ROWS = {"num_train": 1000, "num_held_out": 128}  # windows of a text where nothing else is said


def learn(settings: LearnSettings, progress: bool = True) -> dict[str, Any]:
    """Run the whole job; returns what result.json holds.  Raises InputError before anything is written."""
    settings = settings.resolved()
    out, started = Path(settings.output_dir), time.perf_counter()
    state = saved_state(out, settings.outcome(), resume=settings.resume, overwrite=settings.overwrite)
    model, tokenizer = load_model(settings.model, "float32")
    sets = learning_sets(model, tokenizer, settings)
    base = fingerprint(model)
    learner = Learner(model, pad_token(tokenizer), sets, settings, settings.model)
    if state is not None:
        restore(learner, state, out)
    make_folder(out)
    if state is None:
        for name in (STATE, RESULT, LEARNED, LOG, PICTURE):
            (out / name).unlink(missing_ok=True)
    if settings.recipe in ("closed-form", "forward"):
        nets, curve, numbers = _closed_form(learner)
    else:
        learner.run(partial(save_state, out, settings.outcome()), progress)
        nets, curve, numbers = _best(learner)
    nets = _pruned(nets, learner, settings.prune)

    sigma = learner.points[0].energies(nets, learner.share).sqrt()
    costs = [float((sigma.square() * cost).sum()) for cost in learner.pooled_costs()]
    numbers |= {"suggested_lr": RATE * len(costs) / sum(costs), "zero_blocks": int((sigma == 0).sum())}
    card = Card(
        source="zo learn",
        base_model=getattr(model.config, "name_or_path", "") or settings.model,
        base_fingerprint=base,
        recipe=settings.recipe,
        inputs=RECIPES[settings.recipe],
        noise_contract=NOISE_VERSION,
        tasks=tuple(learning_set.name for learning_set in sets),
        metrics=numbers,
        curve=tuple(_short(curve)),
        sigma=tuple(_short(sigma.tolist())),
    )
    save_pertnn(out / LEARNED, nets, card)
    write_text(out / LOG, "".join(json.dumps(line) + "\n" for line in learner.log))
    draw_scales(out / PICTURE, nets.names, sigma.tolist(), f"{settings.recipe}, learned on {', '.join(card.tasks)}")
    result = {
        "file": str(out / LEARNED),
        "curve": curve,
        **numbers,
        "seconds": time.perf_counter() - started,
        "settings": settings.outcome(),
    }
    write_json(out / RESULT, result)
    return result


def learning_sets(model: nn.Module, tokenizer: Any, settings: LearnSettings) -> list[LearningSet]:
    """Tasks first, then texts, in the order given."""
    data = settings.data if len(settings.data) > 1 else (settings.data or (None,)) * len(settings.tasks)
    counts = {"num_train": settings.num_train, "num_held_out": settings.num_held_out}
    sets = [
        task_set(
            name, folder, model, tokenizer, seed=settings.data_seed, max_length=settings.max_length, **counts
        )
        for name, folder in zip(settings.tasks, data, strict=True)
    ]
    texts = {name: usual if counts[name] is None else counts[name] for name, usual in TEXT_ROWS.items()}
    for text in settings.texts:
        sets.append(
            text_set(text, model, tokenizer, seed=settings.data_seed, length=settings.text_length, **texts)
        )
    return sets


def _best(learner: Learner) -> tuple[PertNN | ScaleNet, list[float], dict[str, Any]]:
    """The networks of the window with the lowest held-out divergence, and how the controls do there."""
    curve = learner.curve()
    best = min(range(len(curve)), key=curve.__getitem__)
    nets = learner.recipe.nets
    nets.load_state_dict(learner.snapshots[best])
    numbers = {
        "best_window": best,
        "divergence": curve[best],
        "steps": len(learner.log),
        "slower": learner.slower,
        **_controls(learner),
    }
    return nets, curve, numbers


def _closed_form(learner: Learner) -> tuple[ScaleNet, list[float], dict[str, Any]]:
    blocks, device = learner.weights.blocks, learner.weights.device
    learner.measure_base()
    sigma = _closed_sigma(learner)
    nets = ScaleNet.fixed(blocks.names, blocks.numels, sigma, source=learner.settings.recipe).to(device)
    value = learner.score(nets)
    spent = {"forwards": learner.forwards} if learner.forwards else {"batches": learner.settings.window}
    return nets, [value], {"divergence": value, **spent, **_controls(learner)}


def _closed_sigma(learner: Learner) -> Tensor:
    """From the mean over learning sets of each block's share of the energy."""
    shares = torch.stack([energy / energy.sum() for energy in learner.energies]).mean(dim=0)
    return closed_form_sigma(shares, learner.layout.numels, learner.share, learner.settings.power)


def _controls(learner: Learner) -> dict[str, float]:
    """The divergence of equal scales, of fresh random networks and of the closed form, at the same points."""
    blocks = learner.weights.blocks
    policies = {
        "sigma_one": ScaleNet.fresh(blocks.names, blocks.numels),
        "random_nets": PertNN.fresh(blocks.names, seed=learner.settings.seed + 1),
        "closed_form": ScaleNet.fixed(blocks.names, blocks.numels, _closed_sigma(learner).cpu(), source=""),
    }
    device = learner.weights.device
    return {f"divergence_{k}": learner.score(p.to(device)) for k, p in policies.items()}


def _pruned(nets: PertNN | ScaleNet, learner: Learner, least: float) -> PertNN | ScaleNet:
    if least > 0 and isinstance(nets, ScaleNet):
        s = torch.stack([point.energies(nets, learner.share) for point in learner.points]).mean(dim=0)
        nets.kept.copy_((s >= min(least, float(s.max()))).float())
    return nets


def _short(values: list[float]) -> list[float]:
    """Six digits: what a card says is read by people."""
    return [float(f"{value:.6g}") for value in values]
