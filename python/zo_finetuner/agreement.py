"""Processes that start one run agree on it, or all stop with one line: never a hang, never two models that drift apart.

    agreed()          what one rank finds wrong with its input is raised on all of them
    require_same()    facts (noise contract, model, weights, data, settings) are compared as fingerprints
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zo_finetuner.errors import InputError
from zo_finetuner.optim.base import Method
from zo_finetuner.optim.settings import settings_of
from zo_finetuner.quantised import parts
from zo_finetuner.ranks import joined
from zo_finetuner.replicas import combined, fingerprint
from zo_kernels import NOISE_VERSION, canonical_name

SAMPLE = 64  # rows of a data set that are compared


class _Told(InputError):
    """Raised on all ranks already."""


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """An InputError of any rank within is raised on all, in its words, at their next `exchange`; the end is one."""
    try:
        yield
    except _Told:
        raise
    except InputError as error:
        exchange(error)
        raise
    exchange(None)


def exchange(value: Any) -> list[Any]:
    """What each rank gives (anything that can be pickled), in their order.  Raises InputError in the words of a rank
    that gives one, or is in trouble (`agreed`)."""
    if not joined():
        if isinstance(value, InputError):
            raise value
        return [value]
    given: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(given, value)
    wrong = [number for number, other in enumerate(given) if isinstance(other, InputError)]
    if wrong:
        where = f" (on rank {wrong[0]} of {len(given)})" if wrong[0] else ""
        raise _Told(f"{given[wrong[0]]}{where}")
    return given


def require_same(facts: Mapping[str, str], method: Method) -> None:
    """facts: what has to be the same on all ranks, each named as a user knows it.  InputError naming the first that is
    not, and for ranks on two kinds of device whose normals differ in their last bits."""
    ranks = exchange({"noise contract": str(NOISE_VERSION), **facts})
    told = difference(ranks)
    if told:
        raise _Told(told)
    kinds = sorted({facts.get("device", "") for facts in ranks})
    if len(kinds) > 1 and getattr(method, "dist", "normal") != "rademacher":
        raise _Told(f"ranks are on {' and '.join(kinds)}, where normal noise differs in its last bits: give "
                    "dist=rademacher (zo train: --set dist=rademacher), or one kind of device")


def difference(ranks: list[dict[str, str]]) -> str:
    """What to tell of the first fact that is not the same on all ranks; empty where all are.  "device" may differ."""
    for name in ranks[0]:
        values = [facts.get(name, "nothing") for facts in ranks]
        other = next((number for number, value in enumerate(values) if value != values[0]), None)
        if other is not None and name != "device":
            return f"rank {other} has another {name} than rank 0 ({values[other]}, not {values[0]}): start all with one"
    return ""


def model_facts(model: nn.Module) -> dict[str, str]:
    """Names, shapes and dtypes; and what stands in the weights, unless each rank has a shard of them."""
    named = [(canonical_name(name), parameter) for name, parameter in model.named_parameters()]
    form = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in named]
    facts = {"model": digest(form), "device": named[0][1].device.type if named else "cpu"}
    if not any(hasattr(parameter, "placements") for _, parameter in named):
        words = torch.stack([fingerprint(part).cpu() for _, parameter in named for part in parts(parameter)])
        facts["weights"] = digest(int(combined(words)))
    return facts


def method_facts(method: Method) -> str:
    """A method's settings and those of its parts, by name."""
    owners = [method, *getattr(method, "parts", {}).values()]
    return digest([(type(o).__name__, [(n, getattr(o, n, None)) for n in settings_of(type(o))]) for o in owners])


def data_facts(rows: Any) -> str:
    """Of a data set with a length: its length, and rows spread over it."""
    count = len(rows) if hasattr(rows, "__len__") else 0
    return digest([count, *(rows[i] for i in range(0, count, max(1, count // SAMPLE)))])


def digest(value: Any) -> str:
    """8 hexadecimal digits of plain values, tensors among them."""
    return hashlib.blake2s(repr(_plain(value)).encode("utf-8"), digest_size=4).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, Mapping):
        return sorted((str(name), _plain(part)) for name, part in value.items())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value

