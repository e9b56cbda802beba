"""`zo learn` and `zo show` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zo_finetuner.errors import InputError

_LISTS = {"task": "tasks", "data": "data", "text": "texts"}


def add_commands(verbs: Any) -> None:
    """Add the verbs to the subparsers of `zo`; each sets `run`, a function of the parsed arguments as a dict."""
    _add_learn(verbs)
    show = _verb(verbs, "show", _show, "print the card of a learned optimizer and draw its scales")
    show.add_argument("file", help=".safetensors of `zo learn`, or a published .pth")
    show.add_argument("--output", metavar="PNG", help="where the picture goes; default: FILE with .png, here")
    show.add_argument("--overwrite", action="store_true", help="replace that picture")


def _verb(verbs: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _add_learn(verbs: Any) -> None:
    parser = _verb(verbs, "learn", _learn, "learn an optimizer for a base model: once per model, for every task")
    add = parser.add_argument
    add("--model", required=True, help="folder of a Hugging Face model, or a Hub id; loaded in float32")
    add("--output-dir", "--out", required=True, help="where the learned optimizer goes")
    add("--recipe", default="improved", help="improved (default), paper, closed-form (8 backward "
        "passes), or forward (the same from forward passes alone)")
    add("--task", action="append", default=[], help="a task to learn on; may be given several times")
    add("--data", action="append", default=[], help="folder of the task, or one with a folder per task")
    add("--text", action="append", default=[], help="a .txt, .txt.xz or .jsonl file, or a folder of them")
    add("--batch-size", type=int, help="rows per step (paper: 8, else 16)")
    add("--windows", type=int, help="times that the base model is started again (paper: 3, improved: 5)")
    add("--window", type=int, help="steps per task in a window (paper: 5 epochs, improved: 60)")
    add("--horizon", type=int, default=1000, help="improved: steps of the runs to learn for (default: 1000)")
    add("--eps", type=float, default=1e-3, help="size of the perturbation (default: 1e-3)")
    add("--lr-mlp", type=float, help="rate of the networks (paper: SGD .1, .05 for several sets; improved: Adam .03)")
    add("--lr-update", type=float, default=1e-6, help="paper: rate of the step that the meta loss is taken after")
    add("--lr-llm", type=float, help="paper: rate of the base model's trajectory (.01; .05 for several sets)")
    add("--zeroth-order", action="store_true", help="paper: move the base model by two-point steps instead of SGD")
    add("--keep-gradients", action=argparse.BooleanOptionalAction, help="paper: hold all gradients until their norm is "
        "known (faster), or take a second backward pass (less memory); default: by size")
    add("--forwards", type=int, default=1000, help="forward: passes to spend per task or text (default: 1000)")
    add("--power", type=float, default=0.5, help="closed-form, forward: exponent of the gradient energy (default: 0.5)")
    add("--prune", type=float, default=0.0, help="all but paper: skip blocks whose squared scale is below this")
    add("--num-train", type=int, help="rows per task (default: the protocol's), windows per text (1000)")
    add("--num-held-out", type=int, help="rows held out per task (default: the protocol's dev), per text (128)")
    add("--max-length", type=int, default=2048, help="longest sequence of a task")
    add("--text-length", type=int, default=128, help="tokens per window of text (default: 128)")
    add("--seed", type=int, default=0, help="seed of the directions and of fresh networks")
    add("--data-seed", type=int, default=0, help="seed of the sample of rows and of their order")
    add("--resume", action="store_true", help="go on from the last whole window in the output folder")
    add("--overwrite", action="store_true", help="replace an earlier run in the output folder")


def _learn(arguments: dict[str, Any]) -> None:
    from zo_finetuner.learning.run import learn
    from zo_finetuner.learning.settings import LearnSettings

    given = {_LISTS.get(name, name): value for name, value in arguments.items() if name not in ("verb", "run")}
    result = learn(LearnSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}))
    spent = f"{result['forwards']} forwards, on its own rows" if "forwards" in result else "held-out"
    print(f"{result['file']}: {spent} divergence {result['divergence']:.3f} (equal scales "
          f"{result['divergence_sigma_one']:.3f}, random nets {result['divergence_random_nets']:.3f}, closed form "
          f"{result['divergence_closed_form']:.3f}); try --lr {result['suggested_lr']:.1e}; {result['seconds']:.0f} s")


def _show(arguments: dict[str, Any]) -> None:
    from zo_finetuner.learning.show import describe_card, draw_scales, held_bytes, scales_to_show
    from zo_finetuner.pertnn_io import load_pertnn

    nets, card = load_pertnn(arguments["file"])
    picture = Path(arguments["output"] or Path(arguments["file"]).with_suffix(".png").name)
    if picture.suffix != ".png":
        raise InputError(f"{picture}: the picture is a .png; change the suffix")
    if picture.exists() and not arguments["overwrite"]:
        raise InputError(f"{picture}: exists; give --output another name, or --overwrite")
    sigma, meaning = scales_to_show(nets, card)
    print(describe_card(card, sigma, meaning, held_bytes(nets), Path(arguments["file"]).stat().st_size))
    title = f"{Path(arguments['file']).name}: {meaning}"
    draw_scales(picture, nets.names, sigma, title, normalised=bool(card.sigma))
    print(f"{'picture:':<24}{picture}")
