"""The command line: `zo train | report | eval | learn | show | replay | diff | plan | demo | convert | env`.

Bad input is one line on stderr and exit code 2.  Heavy imports wait until the verb is known.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from zo_finetuner.errors import InputError, RunStopped

#: Verb -> what `--help` shows below its flags.
EXAMPLES = {
    "train": "zo train --model meta-llama/Llama-3.2-1B --task sst2 --optimizer mezo --steps 20000 --output-dir runs/a",
    "learn": "zo learn --model meta-llama/Llama-3.2-1B --task sst2 --recipe closed-form --out scales",
    "show": "zo show scales/learned.safetensors",
    "report": "zo report runs/a runs/b --output compared.html",
    "eval": "zo eval --model runs/a/model --task sst2 --output scores.json",
    "replay": "zo replay meta-llama/Llama-3.2-1B runs/a/journal.zoj --to 5000 --out rebuilt",
    "diff": "zo diff runs/a/journal.zoj runs/b/journal.zoj",
    "plan": "zo plan --model facebook/opt-30b --task sst2 --batch 16 --seq 256 --device H100",
    "demo": "zo demo --output-dir demo-out",
    "convert": "zo convert llama1b.pth llama1b.safetensors --base-model meta-llama/Llama-3.2-1B",
    "env": "zo env",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code (0, 2 for bad input, 1 for a run that had to stop and for journals that
    differ, 130 after Ctrl-C)."""
    arguments = vars(_parser().parse_args(argv))
    run = arguments.pop("run")
    logging.basicConfig(level=logging.WARNING, format="zo: %(levelname)s: %(message)s")
    leads = os.environ.get("RANK", "0") == "0"  # of several processes the first speaks for all
    logging.getLogger("zo_finetuner").setLevel(logging.INFO if leads else logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry, and we of the failure
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is; not all of it loads
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = _one_line if leads else lambda *_: None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_large_buffers()
    try:
        return run(arguments) or 0
    except InputError as error:
        if "RANK" in os.environ:  # torchrun stops the others when the first has ended: each ends by itself
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if leads:
            print(f"zo: error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"zo: stopped: {error}; `--resume` goes on from the last checkpoint", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"zo: {str(stop) or 'interrupted; `--resume` goes on from what was kept'}", file=sys.stderr)
        return 130


def _one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    print(f"zo: warning: {message}", file=sys.stderr)


def keep_large_buffers() -> bool:
    """Tell glibc to keep large buffers instead of handing each one back to the kernel: on small virtual machines
    page faults otherwise eat most of a CPU step.  For this process only, hence here and not in the library.

    M_TRIM_THRESHOLD = -1, M_MMAP_THRESHOLD = -3 (32 MiB is the largest that glibc takes).  False where it is not
    glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(-3, 32 << 20)) and bool(mallopt(-1, 1 << 30))


def _parser() -> argparse.ArgumentParser:
    from zo_finetuner import journal_command
    from zo_finetuner.config import add_flags, add_settings_flag
    from zo_finetuner.learning.command import add_commands
    from zo_finetuner.loading import DTYPES
    from zo_finetuner.quantised import QUANTISATIONS

    parser = argparse.ArgumentParser(prog="zo", description="Fine-tune language models with forward passes only.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    add_flags(verb("train", _train, "fine-tune a model on a task"))
    add_commands(verbs)
    journal_command.add_commands(verbs)

    evaluate = verb("eval", _eval, "loss and metric of a model on a task's validation rows, or on rows of your own")
    evaluate.add_argument("--model", required=True, help="folder of a Hugging Face model, or a Hub id")
    evaluate.add_argument("--task", default="", help="without one, --data or --test-data are rows of your own")
    evaluate.add_argument("--data", help="as for zo train: the test rows that it would hold out are evaluated")
    evaluate.add_argument("--test-data", help="rows of your own to evaluate, all of them")
    evaluate.add_argument("--dev-data", help="as in training: with it no dev rows are held out")
    evaluate.add_argument("--num-dev", type=int, help="as in training: test rows are held out after the dev rows")
    add_settings_flag(evaluate, "--columns", "a column of your data by another name, NAME=COLUMN; repeat it")
    evaluate.add_argument("--objective", help="measure by an objective of your own, FILE.py:NAME or MODULE:NAME")
    evaluate.add_argument("--maximize", action="store_true", help="it is one of which more is better")
    evaluate.add_argument("--dtype", default="auto", choices=DTYPES)
    evaluate.add_argument("--quantize", choices=QUANTISATIONS, help="of an adapter's base, as in training")
    evaluate.add_argument("--batch-size", type=int, default=32)
    evaluate.add_argument("--num-eval", type=int, help="test rows; default: the protocol's, or all of your own")
    evaluate.add_argument("--max-length", type=int, default=2048)
    evaluate.add_argument("--data-seed", type=int, default=0)
    evaluate.add_argument("--output", help="also write the numbers to this JSON file")

    report = verb("report", _report, "curves and tables of runs, one or several side by side: an HTML page and a PNG")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder that zo train wrote, or still writes")
    report.add_argument("--output", metavar="HTML", help="the page; the picture has its name with .png (default: of "
                        "one run RUN/report.html and RUN/curve.png, of several report.html here)")
    report.add_argument("--overwrite", action="store_true", help="replace an earlier page of several runs")

    plan = verb("plan", _plan, "predict memory and time of a step from a model's config, before anything is downloaded")
    plan.add_argument("--model", required=True, help="folder with a config.json, or a Hub id (its config is fetched)")
    plan.add_argument("--task", default="sst2", help="decides how many logits a row needs (default: sst2)")
    plan.add_argument("--batch", type=int, default=16, help="rows (default: 16)")
    plan.add_argument("--seq", type=int, default=256, help="tokens of every row (default: 256)")
    plan.add_argument("--option-tokens", type=int, help="tokens of an answer (default: 1 in classification, else 16)")
    plan.add_argument("--optimizer", default="mezo")
    add_settings_flag(plan, "--set", "a setting of the optimizer, NAME=VALUE; as often as needed")
    plan.add_argument("--adapter", choices=("lora", "dora"), help="plan for an adapter instead of the whole model")
    plan.add_argument("--lora-rank", type=int, default=0, help="of the adapter (default: 8)")
    plan.add_argument("--probing", default="auto", help="auto, scratch, inplace or paired")
    plan.add_argument("--dtype", default="auto", help=", ".join(DTYPES))
    plan.add_argument("--graphs", action=argparse.BooleanOptionalAction, help="count what CUDA graphs of steps hold "
                      "(default: as zo train makes them, on a GPU)")
    plan.add_argument("--device", help="cpu, or a GPU by name (default: the one here, else all that are known)")
    plan.add_argument("--device-memory", type=float, metavar="GIB", help="a device of so much memory")
    plan.add_argument("--json", action="store_true", help="print the numbers as JSON (bytes, seconds)")

    demo = verb("demo", _demo, "pretrain a tiny model, fine-tune it two ways, draw the curves; needs no file")
    demo.add_argument("--output-dir", default="demo-out")
    demo.add_argument("--seed", type=int, default=0)

    convert = verb("convert", _convert, "turn a published PertNN .pth into safetensors with a card")
    convert.add_argument("source", help="published .pth file (read without executing what it pickles)")
    convert.add_argument("target", help="new .safetensors file")
    convert.add_argument("--base-model", default="", help="name of the model it was learned for")

    verb("env", _env, "what this machine can do, what is missing, and the command that adds it")
    for name, added in verbs.choices.items():
        added.formatter_class = argparse.RawDescriptionHelpFormatter
        added.epilog = f"example:\n  {EXAMPLES[name]}" if name in EXAMPLES else None
    return parser


def _train(arguments: dict[str, Any]) -> None:
    from zo_finetuner.agreement import agreed
    from zo_finetuner.config import resolve
    from zo_finetuner.ranks import join, leads, leave

    arguments.pop("verb")
    join()
    with agreed():
        config = resolve(arguments)
    from zo_finetuner.training import train

    result = train(config)
    if not leads():
        return leave()
    print(f"{Path(config.output_dir) / 'result.json'}: {result['metric']} {result['eval_metric_before']:.3f} -> "
          f"{result['eval_metric_after']:.3f}, loss {result['eval_loss_before']:.4f} -> "
          f"{result['eval_loss_after']:.4f}, {result['forwards']} forwards in {result['seconds']:.0f} s")
    if "ranks" in result:
        print("{processes} processes: {sent_bytes_per_step:.1f} bytes sent by each in a step, "
              "{received_bytes_per_step:.1f} received".format_map(result["ranks"]))
    leave()


EVALUATED = ("task", "data", "dev_data", "test_data", "objective", "maximize", "num_dev", "num_eval", "data_seed")


def _eval(arguments: dict[str, Any]) -> None:
    from zo_finetuner.config import RunConfig, parse_settings
    from zo_finetuner.encoding import context_length
    from zo_finetuner.files import write_json
    from zo_finetuner.loading import load_model
    from zo_finetuner.workload import make_workload

    if arguments["batch_size"] < 1:
        raise InputError(f"batch_size must be at least 1, got {arguments['batch_size']}")
    config = RunConfig(
        columns=parse_settings(arguments.get("columns", []), "--columns"),
        **{name: arguments[name] for name in EVALUATED},
    )
    config.check_data(config.data or config.test_data)
    work = make_workload(config)
    model, tokenizer = load_model(arguments["model"], arguments["dtype"], quantize=arguments["quantize"])
    encoded = work.encode("test", tokenizer, context_length(model, arguments["max_length"]))
    values = work.evaluate(model, encoded, tokenizer, arguments["batch_size"], progress=True)
    print(json.dumps(values, indent=2))
    if arguments["output"]:
        write_json(Path(arguments["output"]), values)


def _report(arguments: dict[str, Any]) -> None:
    from zo_finetuner.report_page import report

    output = arguments["output"]
    page, picture = report([Path(run) for run in arguments["runs"]], Path(output) if output else None,
                           arguments["overwrite"])  # fmt: skip
    print(f"{page} ({page.stat().st_size / 1024:.0f} KB), {picture}")


def _plan(arguments: dict[str, Any]) -> None:
    from zo_finetuner.adapters import Adapter
    from zo_finetuner.config import parse_settings
    from zo_finetuner.plan import make_plan, plan_devices
    from zo_finetuner.plan_report import as_json, report

    settings = parse_settings(arguments.get("set", []))
    asked = ("task", "batch", "seq", "option_tokens", "optimizer", "probing", "dtype")
    graphs = arguments["graphs"]
    if graphs is None:
        graphs = (arguments["device"] or "").casefold() != "cpu"
    named = {name: arguments[name] for name in asked}
    adapter = Adapter(arguments["adapter"], arguments["lora_rank"]) if arguments["adapter"] else None
    plan = make_plan(arguments["model"], **named, settings=settings, graphs=graphs, adapter=adapter)
    devices = plan_devices(plan, arguments["device"], arguments["device_memory"])
    print(json.dumps(as_json(plan, devices), indent=2) if arguments["json"] else report(plan, devices))


def _demo(arguments: dict[str, Any]) -> None:
    from zo_finetuner.demo import run_demo

    run_demo(Path(arguments["output_dir"]), seed=arguments["seed"])


def _convert(arguments: dict[str, Any]) -> None:
    import dataclasses

    from zo_finetuner.pertnn_io import load_pertnn, save_pertnn

    nets, card = load_pertnn(arguments["source"])
    if arguments["base_model"]:
        card = dataclasses.replace(card, base_model=arguments["base_model"])
    save_pertnn(arguments["target"], nets, card)
    print(f"{arguments['target']}: {len(nets.names)} nets")


def _env(arguments: dict[str, Any]) -> None:
    from zo_finetuner.environment import describe

    print(describe())


if __name__ == "__main__":
    sys.exit(main())
