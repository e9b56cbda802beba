"""`zo show FILE`: the card of a learned optimizer in words, and its scales by layer and kind of block as a picture."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch

from zo_finetuner.block_kinds import KINDS, block_kind, layer_of
from zo_finetuner.cards import Card
from zo_finetuner.files import write_bytes
from zo_finetuner.history import History
from zo_finetuner.pertnn import PertNN
from zo_finetuner.scale_net import ScaleNet
from zo_kernels import BlockStats

USUAL_LOSS = 1.0  # loss+ and loss- that the paper's networks are shown at, where a card holds no scales


def scales_to_show(nets: PertNN | ScaleNet, card: Card) -> tuple[list[float], str]:
    """A scale per block, and what it is: the card's own, or what the networks answer to usual inputs."""
    if card.sigma:
        return list(card.sigma), "normalised scale at the base weights"
    norm = torch.tensor(["norm" in name and not name.endswith("bias") for name in nets.names])
    bias = torch.tensor([name.endswith("bias") for name in nets.names])
    mean, var = torch.where(norm, 0.5, 0.0), torch.where(norm | bias, 0.01, 4e-4)
    stats = BlockStats(mean, var, torch.zeros_like(mean), torch.zeros(len(mean), dtype=torch.int64))
    history = History.start(len(nets.names))
    history.remember(torch.full((2,), USUAL_LOSS))
    with torch.no_grad():
        for _ in range(5):  # published networks settle in 3 steps (median)
            history.sigma = nets.scales(stats, history)
    return history.sigma.tolist(), f"raw sigma at loss {USUAL_LOSS:g}, weights of usual size"


def held_bytes(nets: PertNN | ScaleNet) -> int:
    """What a run holds besides the weights: the networks, and a history's numbers for every block."""
    numbers = [*nets.state_dict().values(), *History.start(len(nets.names)).state_dict().values()]
    return sum(tensor.nbytes for tensor in numbers)


def describe_card(card: Card, sigma: list[float], meaning: str, size: int, on_disk: int = 0) -> str:
    """The card in lines of text.  size: `held_bytes`."""
    ordered = sorted(sigma)
    middle, skipped = ordered[len(ordered) // 2], sum(value == 0 for value in sigma)
    largest = max(range(len(sigma)), key=sigma.__getitem__)
    lines = {
        "source": card.source,
        "recipe": card.recipe,
        "base model": card.base_model or "not named",
        "fingerprint": card.base_fingerprint or "none",
        "learned on": ", ".join(card.tasks) or "not named",
        "networks": f"{len(card.names)} blocks, hidden width {card.hidden}",
        "size": f"{size:,} bytes in a run" + (f", {on_disk:,} on disk" if on_disk else ""),
        "noise": f"contract version {card.noise_contract}" if card.noise_contract else "torch's generators",
        "meta loss": " ".join(f"{value:.4f}" for value in card.curve) or "not recorded",
        "scales": f"{meaning}: {ordered[0]:.3g} to {ordered[-1]:.3g}, median {middle:.3g}; {skipped} are zero",
        "largest": f"{card.names[largest]}, {sigma[largest]:.3g}",
        **{name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in card.metrics.items()},
    }
    return "\n".join(f"{name + ':':<24}{value}" for name, value in lines.items())


def draw_scales(path: Path, names: tuple[str, ...], sigma: list[float], title: str, *, normalised: bool = True) -> None:
    """A png: a row per kind of block, a column per layer, colour the log of the scale (white is 1, or the geometric
    mean of scales that are not normalised); blocks outside the layers in a last column, grey where there is none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid, kinds, layers = _grid(names, sigma)
    size = (max(6.0, 2.5 + 0.28 * len(layers)), 2.0 + 0.32 * len(kinds))
    figure, axes = plt.subplots(figsize=size)
    finite = [value for row in grid for value in row if math.isfinite(value)]
    middle = 0.0 if normalised or not finite else sum(finite) / len(finite)
    reach = max((abs(value - middle) for value in finite), default=0.0) or 1.0
    axes.set_facecolor("0.85")
    image = axes.imshow(grid, cmap="RdBu_r", vmin=middle - reach, vmax=middle + reach, aspect="auto")
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, len(layers) // 24)
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set_xlabel("layer; last: outside the layers (grey: no such block, or scale 0)")
    bar = figure.colorbar(image, ax=axes)
    marks = [middle + part * reach for part in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    bar.set_ticks(marks, labels=[f"{10**mark:.3g}" for mark in marks])
    bar.set_label("scale")
    axes.set_title(title, fontsize=10)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    write_bytes(path, picture.getvalue())


def _grid(names: tuple[str, ...], sigma: list[float]) -> tuple[list[list[float]], list[str], list[str]]:
    """log10 of the mean scale of each (kind, layer), NaN where there is none; labels of rows and columns."""
    cells: dict[tuple[str, int | None], list[float]] = {}
    for name, value in zip(names, sigma, strict=True):
        cells.setdefault((block_kind(name), layer_of(name)), []).append(value)
    kinds = [kind for kind in KINDS if any(kind == k for k, _ in cells)]
    layers: list[Any] = sorted({layer for _, layer in cells if layer is not None})
    if any(layer is None for _, layer in cells):
        layers.append(None)

    def value(kind: str, layer: int | None) -> float:
        held = cells.get((kind, layer), [0.0])
        mean = sum(held) / len(held)
        return math.log10(mean) if mean > 0 else math.nan

    labels = ["-" if layer is None else str(layer) for layer in layers]
    return [[value(kind, layer) for layer in layers] for kind in kinds], kinds, labels
