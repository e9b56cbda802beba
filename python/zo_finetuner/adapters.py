"""Adapters by name: a PEFT model that trains a few floating tensors beside a frozen base, and the rates for it.

    lora     W x + alpha / r * B A x                    rank r
    dora     the same with a learned norm for every output of W
    prefix   keys and values of V places in every layer; at first those that V tokens of the vocabulary have there
    prompt   V embeddings before every row; at first those of V tokens of the vocabulary

Rates, and where they are from: `RATES`.  A prefix that the base does not take as it takes real tokens (keys of another
shape, no cache) is refused: the model is asked.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.optim.create import PRESETS
from zo_finetuner.reading import is_plain, read_object, shown
from zo_finetuner.tensor_files import read_header

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rates:
    lr: float
    eps: float
    source: str


RATES = {
    "lora": Rates(1e-4, 1e-2, "MeZO (Malladi et al. 2023), OPT-13B: lr 1e-4 or 5e-5; RoBERTa-large 1e-4 at eps 1e-3"),
    "dora": Rates(1e-4, 1e-2, "LoRA's: nothing is published for it"),
    "prefix": Rates(1e-2, 1e-1, "MeZO, OPT-13B: lr 1e-2 or 1e-3; RoBERTa-large 1e-2"),
    "prompt": Rates(1e-3, 1e-2, "ZO-Bench (Zhang et al. 2024): largest of its sweeps, lr 1e-3..1e-6, eps 1e-2..1e-4"),
}
ADAPTERS = tuple(RATES)
TOKENS = {"prefix": 5, "prompt": 10}  # MeZO's, ZO-Bench's
RANK = 8  # MeZO's and ZO-Bench's, with alpha 16


@dataclass(frozen=True)
class Adapter:
    """kind: one of ADAPTERS.  rank, alpha, targets (names of modules, or "all-linear"; None: PEFT's for the
    architecture): of lora and dora.  tokens: of prefix and prompt.  0: the default.  Raises InputError."""

    kind: str
    rank: int = 0
    alpha: int = 16
    targets: str | None = None
    tokens: int = 0

    def __post_init__(self):
        if self.kind not in ADAPTERS:
            raise InputError(f'unknown adapter "{self.kind}"{nearest(self.kind, ADAPTERS)}; there are: '
                             f"{', '.join(ADAPTERS)}")
        virtual = self.kind in TOKENS
        for name, given in (("lora_rank", self.rank), ("lora_targets", self.targets)):
            if given and virtual:
                raise InputError(f"{name} goes with the adapters lora and dora; {self.kind} has virtual_tokens")
        if self.tokens and not virtual:
            raise InputError(f"virtual_tokens goes with the adapters prefix and prompt; {self.kind} has lora_rank")
        for name in ("rank", "tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} of the adapter must not be negative, got {getattr(self, name)}")


def add_adapter(model: nn.Module, adapter: Adapter, seed: int = 0) -> nn.Module:
    """The PEFT model of a causal language model; the adapter alone has `requires_grad`.

    seed: of the tokens that a prefix or prompt starts with (LoRA's A is drawn by PEFT, from torch's generator).
    Raises InputError: PEFT is missing or does not know the model's layers, or a prefix that the model cannot take."""
    try:
        import peft
    except ImportError:
        raise InputError(f"adapter {adapter.kind}: peft is not installed: pip install peft") from None
    common = {"task_type": peft.TaskType.CAUSAL_LM}
    count = adapter.tokens or TOKENS.get(adapter.kind, 0)
    training, states = model.training, None
    model.eval()
    if adapter.kind == "prefix":
        states = _states(model, _real_tokens(model, count, seed))
        _, both, heads, width = states.shape  # asked of the model: with grouped queries keys have fewer heads
        config = peft.PrefixTuningConfig(
            num_virtual_tokens=count, num_layers=both // 2, num_attention_heads=heads, token_dim=heads * width, **common
        )
    elif adapter.kind == "prompt":
        config = peft.PromptTuningConfig(num_virtual_tokens=count, **common)
    else:
        targets = adapter.targets
        if targets not in (None, "all-linear"):
            targets = [name.strip() for name in targets.split(",") if name.strip()]
        config = peft.LoraConfig(
            r=adapter.rank or RANK, lora_alpha=adapter.alpha, use_dora=adapter.kind == "dora", target_modules=targets,
            **common,
        )
    try:
        wrapped = peft.get_peft_model(model, config)
    except (ValueError, AttributeError, TypeError, KeyError, ImportError) as error:  # of a torchao it does not know
        hint = "; name the layers: --lora-targets q_proj,v_proj or all-linear" if "target_modules" in str(error) else ""
        raise InputError(f"adapter {adapter.kind}: {' '.join(str(error).split())[:300]}{hint}") from None
    wrapped.to(model.device).train(training)
    if count:
        _start_with_tokens(wrapped, states, _real_tokens(model, count, seed))
    return wrapped


def adapter_kind(model: nn.Module) -> str | None:
    """One of ADAPTERS for a PEFT model of such a kind; None for a whole model and for other kinds."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    kind = str(getattr(config, "peft_type", "")).rpartition(".")[2]
    if kind == "LORA":
        return "dora" if config.use_dora else "lora"
    return {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "prompt"}.get(kind)


def default_rates(optimizer: str, kind: str | None) -> tuple[float, float]:
    """(lr, eps) of a method for an adapter: RATES for a method that takes MeZO's rates for a whole model; the method's
    own for one that normalises its step (signs, moments, spreads), of which little is published."""
    preset = PRESETS[optimizer]
    if kind is None:
        return preset.lr, preset.eps
    mezo = PRESETS["mezo"]
    if (preset.lr, preset.eps) == (mezo.lr, mezo.eps) and "rule" not in preset.settings:
        return RATES[kind].lr, RATES[kind].eps
    logger.info("%s with a %s adapter: lr %g, eps %g are its own", optimizer, kind, preset.lr,
                preset.eps)
    return preset.lr, preset.eps


def adapter_base(source: str) -> str | None:
    """The base model of a folder that holds a saved adapter; None for anything else.  Raises InputError."""
    file = Path(source) / "adapter_config.json"
    if not file.is_file() or (Path(source) / "config.json").is_file():
        return None
    base = read_object(file, "save the adapter again").get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise InputError(f"{file}: names no base_model_name_or_path; write the base model's folder or Hub id there")
    if not is_plain(base):
        raise InputError(f"{file}: base_model_name_or_path is {shown(base)}; write the base's folder or Hub id there")
    if (Path(base) / "adapter_config.json").is_file():
        raise InputError(f"{file}: names as its base {shown(base)}, an adapter too; merge that one into its base first")
    return base


def load_adapter(model: nn.Module, folder: str) -> nn.Module:
    """The PEFT model of a base and a saved adapter, ready to be trained on.  Raises InputError."""
    try:
        import peft
    except ImportError:
        raise InputError(f"model {folder}: is an adapter, but peft is not installed: pip install peft") from None
    weights = Path(folder) / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(f"{weights}: no such file; save the adapter with save_pretrained()")
    read_header(weights)
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        if not config.is_prompt_learning:
            wrapped = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
            _require_stored(wrapped, weights)
            return wrapped
        config.inference_mode = False  # PEFT loads virtual tokens frozen or not at all
        wrapped = peft.get_peft_model(model, config)
        peft.set_peft_model_state_dict(wrapped, peft.load_peft_weights(folder, device=str(model.device)))
        return wrapped
    except InputError:
        raise
    except Exception as error:  # of any type: what its config says is taken without a check
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"model {folder}: the adapter does not go onto its base ({shown(reason, 300)})") from None


def _require_stored(wrapped: nn.Module, weights: Path) -> None:
    """InputError where a tensor of the adapter is not in its file: PEFT leaves it as it was drawn."""
    import peft

    needed = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    if missing := sorted(needed - read_header(weights).tensors.keys()):
        raise InputError(f"{weights}: tensor {missing[0]} is not in the file ({len(missing)} are missing) and would be "
                         "random; save the adapter again")


def _real_tokens(model: nn.Module, count: int, seed: int) -> Tensor:
    """(1, count) different token ids, from all of the vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.tensor([random.Random(seed).sample(range(vocabulary), count)], device=model.device)


@torch.no_grad()
def _states(model: nn.Module, ids: Tensor) -> Tensor:
    """(V, 2 * layers, heads, width): keys and values in every layer at V tokens.  Raises InputError."""
    who = type(model).__name__
    try:
        output = model(input_ids=ids, use_cache=True)
    except Exception as error:
        raise InputError(f"adapter prefix: {who} keeps no cache ({' '.join(str(error).split())[:200]})") from None
    cache = output.get("cache", output.get("past_key_values"))
    layers = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(cache, "layers", [])]
    states = [tensor for pair in layers for tensor in pair]
    if not states or any(not isinstance(tensor, Tensor) for tensor in states):
        raise InputError(f"adapter prefix: {who} has layers without keys and values; lora, dora and prompt need none")
    if len({tensor.shape for tensor in states}) > 1 or states[0].shape[2] != ids.shape[1]:
        shapes = ", ".join(sorted({"x".join(map(str, tensor.shape[1:])) for tensor in states}))
        raise InputError(f"adapter prefix: {who} keeps keys and values of different shapes, or shorter than "
                         f"{ids.shape[1]} tokens (heads x tokens x width: {shapes}); use lora, dora or prompt")
    return torch.stack([tensor[0].transpose(0, 1) for tensor in states], 1)


@torch.no_grad()
def _start_with_tokens(model: nn.Module, states: Tensor | None, ids: Tensor) -> None:
    """The virtual tokens become real ones, and the model has to answer as to these: else InputError."""
    base, encoder = model.get_base_model(), model.prompt_encoder[model.active_adapter]
    weight = encoder.embedding.weight
    start = base.get_input_embeddings()(ids)[0] if states is None else states.flatten(1)
    kind = "prompt" if states is None else "prefix"
    if start.shape != weight.shape:
        raise InputError(f"adapter {kind}: PEFT makes it {tuple(weight.shape)} where {type(base).__name__} needs "
                         f"{tuple(start.shape)}; use lora or dora")
    weight.copy_(start)
    text = ids.flip(1)
    try:
        alone, behind, given = (m(input_ids=i).logits[0, -1].float() for m, i in (
            (base, text), (base, torch.cat((ids, text), 1)), (model, text)))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise InputError(f"adapter {kind}: {type(base).__name__} does not take it ({reason})") from None
    if 8 * (given - behind).norm() > (alone - behind).norm():  # rounding is far below, a wrong place far above
        raise InputError(f"adapter {kind}: {type(base).__name__} does not read it as it reads tokens; use lora or dora")
