"""What is learned once per model and set, by `zo learn`'s own job: scales of three recipes.

The paper's recipe as published: 300 rows, batches of 8, three windows of five epochs, its own rates.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bench.quality.bed import ADAM_STEPS, Bed
from bench.quality.cells import BATCH, DERIVED_ON, EPS, HORIZON, WINDOW, Cell, text_file
from zo_finetuner.block_kinds import layer_of
from zo_finetuner.encoding import pad_token
from zo_finetuner.files import write_json
from zo_finetuner.learning.improved import RATE
from zo_finetuner.learning.profile import Estimate, Layout, Mean, sample
from zo_finetuner.learning.run import learn
from zo_finetuner.learning.settings import LearnSettings
from zo_finetuner.learning.sources import batch_rows, loss_on, text_set
from zo_finetuner.learning.streaming import Weights
from zo_finetuner.loading import load_model
from zo_finetuner.pertnn_io import load_pertnn
from zo_finetuner.scale_net import ScaleNet
from zo_kernels import derive_seed

DERIVED, DERIVING_RATE = "derived.json", 7e-4
PAPER_ROWS = 300  # COPA's training rows in the paper's protocol
SAMPLES = 8


def artefact_path(work: Path, model: str, recipe: str, sets: tuple[str, ...]) -> Path:
    return work / "learned" / f"{Path(model).name}-{recipe}-{'+'.join(sets)}" / "learned.safetensors"


def make_artefact(
    work: Path, shared: Path, model: str, recipe: str, sets: tuple[str, ...], quick: bool
) -> Path:
    """Learns unless it has been; goes on from the last whole window."""
    path = artefact_path(work, model, recipe, sets)
    if not (path.parent / "result.json").is_file():
        tasks = tuple(name for name in sets if not name.endswith("-text"))
        texts = tuple(str(text_file(name, shared, work)) for name in sets if name.endswith("-text"))
        short = {"windows": 1, "window": 8 if recipe == "closed-form" else 40} if quick else {}
        learn(
            LearnSettings(
                model=model, output_dir=str(path.parent), recipe=recipe, tasks=tasks, texts=texts,
                data=(str(shared / "data"),) if tasks else (), text_length=WINDOW, horizon=HORIZON,
                num_train=PAPER_ROWS if recipe == "paper" else None, eps=EPS, resume=True, **short,
            ),
            progress=False,
        )  # fmt: skip
    return path


def derive(work: Path, shared: Path, base: str, out: Path) -> None:
    """A derivative of a base model: Adam's steps on film reviews, every weight moved; a Hugging Face folder."""
    bed = Bed(Cell(base, DERIVED_ON, ADAM_STEPS), shared, work)
    run = bed.adam(DERIVING_RATE, 0, "dev")
    bed.model.save_pretrained(out)
    bed.tokenizer.save_pretrained(out)
    write_json(out / DERIVED, {"base": Path(base).name, "dev_loss": [loss for _, loss in run.curve]})


def per_layer(path: Path) -> ScaleNet:
    """One scale per layer: the mean of the learned log scales of its blocks; blocks outside of layers keep theirs."""
    nets, card = load_pertnn(path)
    sigma = torch.tensor(card.sigma)
    layers = [layer_of(name) for name in nets.names]
    averaged = sigma.clone()
    for layer in set(layers) - {None}:
        members = torch.tensor([other == layer for other in layers])
        averaged[members] = sigma[members].log().mean().exp()
    return ScaleNet.fixed(nets.names, [1] * len(nets.names), averaged, source=f"{path}, per layer")


def central_rate(work: Path, shared: Path, model_folder: str) -> float:
    """RATE / sum T: where equal scales' best rate on plain text is expected, for all methods and cells of a model; two
    digits."""
    model, tokenizer = load_model(model_folder, "float32")
    source = str(text_file("squad-text", shared, work))
    rows = text_set(source, model, tokenizer, seed=0, num_train=16 * SAMPLES, num_held_out=1, length=WINDOW).train
    weights, estimate = Weights(model), Estimate(None, Mean())
    for i in range(SAMPLES):
        loss_fn = loss_on(model, batch_rows(rows, BATCH, i, 0), pad_token(tokenizer))
        step = torch.tensor(EPS, device=weights.device)
        estimate.add(sample(weights, loss_fn, derive_seed(0, i, 0), derive_seed(0, i // 2, 1), step))
    cost: Tensor = Layout(weights.blocks).pooled(estimate.cost)
    return float(f"{RATE / float(cost.sum()):.1e}")


def overhead(names: list[str], numels: list[int]) -> dict[str, int]:
    """Bytes of what stays in memory in deployment, per policy, for a model of these blocks."""
    from zo_finetuner.pertnn import PertNN

    def size(nets: nn.Module) -> int:
        return sum(t.nbytes for t in (*nets.parameters(), *nets.buffers()))

    return {"paper": size(PertNN.fresh(names)), "improved": size(ScaleNet.fresh(names, numels))}
