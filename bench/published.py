"""The published order of a zeroth-order step, written anew in plain torch, to be measured against.

    MeZO (large models)      +eps, forward, -2 eps, forward, +eps, update: four sweeps, each tensor by tensor
                             z = normal(shape), p = p + c eps z; the losses come to the host by `.item()`
    ZO Fine-tuner            the same with a scale per block: mean, variance and a small network for each tensor,
                             its result to the host (Zeng et al. 2025, arXiv 2510.00419; deployment code)
    the loss                 every candidate is a sequence of its own, padded on the left; logits of the whole
                             vocabulary at every position; then the mean log-probability of the option's tokens

A noise source is `noise(seed)`, giving `draw(name, parameter) -> z`: `torch_noise` is the published one.  With the
noise of `zo_kernels` these steps have the losses and weights of our engine, to rounding (tests/test_published.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_finetuner.encoding import Encoded, pad_left
from zo_finetuner.pertnn import PertNN, budget
from zo_finetuner.phases import phase

Draw = Callable[[str, Tensor], Tensor]
Noise = Callable[[int], Draw]


def torch_noise(seed: int) -> Draw:
    """The global generator, seeded anew for every sweep; normals in the parameter's dtype on its device."""
    torch.manual_seed(seed)
    return lambda name, p: torch.normal(mean=0, std=1, size=p.size(), dtype=p.dtype, device=p.device)


def option_loss(model: nn.Module, rows: Sequence[Encoded], pad_id: int) -> Tensor:
    """0-dim loss of a batch in the logits' dtype: over candidates for classification, else over the tokens of the
    correct options."""
    classify = rows[0].kind == "classification"
    picked = [(r, c) for r in rows for c in (range(len(r.sequences)) if classify else r.labels[:1])]
    sequences = [r.sequences[c] for r, c in picked]
    lengths = torch.tensor([r.option_lengths[c] for r, c in picked])
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in pad_left(sequences, pad_id, 1).items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=batch["position_ids"]).logits
    with phase("loss"):
        return _option_loss(logits, ids, lengths, rows)


def _option_loss(logits: Tensor, ids: Tensor, lengths: Tensor, rows: Sequence[Encoded]) -> Tensor:
    width = ids.shape[1]
    counted = torch.arange(1, width)[None, :] >= width - lengths[:, None]  # padded on the left: options end the rows
    counted = counted.to(logits.device)
    logs = F.log_softmax(logits[:, :-1], dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    if rows[0].kind != "classification":
        return -(logs * counted).sum() / counted.sum()
    scores = (logs * counted).sum(1) / counted.sum(1)
    losses, at = [], 0
    for row in rows:  # rows may differ in their number of candidates
        own = scores[at : at + len(row.sequences)]
        losses.append(F.cross_entropy(own[None], torch.tensor(row.labels[:1], device=logits.device)))
        at += len(row.sequences)
    return torch.stack(losses).mean()


class PublishedMeZO:
    """One `step(loss_fn, seed)` is MeZO's, sweep by sweep.  loss_fn: () -> 0-dim tensor."""

    def __init__(self, model: nn.Module, *, lr: float, eps: float, noise: Noise = torch_noise):
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.lr, self.eps, self.noise = lr, eps, noise

    def scales(self) -> dict[str, float] | None:
        """Per-block scales of this step's perturbation; None for ones."""
        return None

    @torch.no_grad()
    def step(self, loss_fn: Callable[[], Tensor], seed: int) -> tuple[float, float]:
        """The losses at +eps and -eps."""
        with phase("ask"):
            scales = self.scales()
        self._perturb(seed, 1, scales)
        loss_pos = self._evaluate(loss_fn)
        self._perturb(seed, -2, scales)
        loss_neg = self._evaluate(loss_fn)
        self._perturb(seed, 1, scales)
        projected_grad = (loss_pos - loss_neg) / (2 * self.eps)
        with phase("update"):
            draw = self.noise(seed)
            for name, p in self.named:
                z = draw(name, p)
                p.data = p.data - self.lr * (projected_grad * (z if scales is None else scales[name] * z))
        self.finished(loss_pos, loss_neg)
        return loss_pos, loss_neg

    def _perturb(self, seed: int, factor: int, scales: dict[str, float] | None) -> None:
        with phase("probe"):
            draw = self.noise(seed)
            for name, p in self.named:
                z = draw(name, p)
                p.data = p.data + factor * (z if scales is None else scales[name] * z) * self.eps

    def _evaluate(self, loss_fn: Callable[[], Tensor]) -> float:
        with phase("forward"):
            return loss_fn().item()

    def finished(self, loss_pos: float, loss_neg: float) -> None:
        """What a method keeps of a step's losses."""


class PublishedZOFineTuner(PublishedMeZO):
    """A network per tensor, asked one by one, each answer brought to the host."""

    def __init__(self, model: nn.Module, nets: PertNN, *, batch_size: int, **kwargs):
        super().__init__(model, **kwargs)
        names = [name for name, _ in self.named]
        nets = nets.select(names)
        self.nets = {name: _sequential(nets, i, p) for i, (name, p) in enumerate(self.named)}
        numels = [p.numel() for _, p in self.named]
        hidden = model.config.get_text_config().hidden_size
        self.budget = dict(zip(names, budget(names, numels, hidden_size=hidden, batch_size=batch_size).tolist(),
                               strict=True))
        self.raw = dict.fromkeys(names, 1.0)
        self.losses = (0.0, 0.0)

    def scales(self) -> dict[str, float]:
        for name, p in self.named:
            features = torch.stack([p.mean(), p.var(), *(p.new_tensor(v) for v in (*self.losses, self.raw[name]))])
            self.raw[name] = self.nets[name](features).abs().item()
        total = sum(self.budget.values())
        norm = math.sqrt(total) / math.sqrt(sum(c * self.raw[name] ** 2 for name, c in self.budget.items()))
        return {name: norm * sigma for name, sigma in self.raw.items()}

    def finished(self, loss_pos: float, loss_neg: float) -> None:
        self.losses = (loss_pos, loss_neg)


def _sequential(nets: PertNN, i: int, like: Tensor) -> nn.Sequential:
    """Network i as published: an nn.Sequential in the model's dtype."""
    net = nn.Sequential(nn.Linear(5, nets.hidden), nn.Tanh(), nn.Linear(nets.hidden, 1))
    with torch.no_grad():
        for target, source in zip(net.parameters(), (nets.w1[i], nets.b1[i], nets.w2[i][None], nets.b2[i : i + 1]),
                                  strict=True):
            target.copy_(source)
    return net.to(device=like.device, dtype=like.dtype)
