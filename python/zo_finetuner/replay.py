"""The weights of any step of a run, from its base model and its journal.

    kind "sum"      the records hold the coefficients of every update (and of every probe made in place): K steps are
                    one pass over the weights, each rounded as the run rounded it
    kind "rerun"    the method is asked and told again, with the journalled losses in place of forwards; its rule, its
                    state and its merges are what they were

A sum of random signs (`dist` "rademacher") is bit-equal on every backend, all else on the backend and the kind of
device of the run, under the same versions: `differences` says what is another one here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy
import torch
from torch import Tensor, nn

from zo_finetuner.cards import fingerprint, same_shapes
from zo_finetuner.engine import Engine, Given
from zo_finetuner.errors import InputError, UnstableRun
from zo_finetuner.guards import Limits
from zo_finetuner.journal import FLUSHED, Header, Journal, read_journal
from zo_finetuner.optim.base import Method
from zo_finetuner.optim.create import make_method
from zo_finetuner.recorder import here
from zo_kernels import NOISE_VERSION, ROUNDING_PROBE, Blocks, derive_seed, replay_

logger = logging.getLogger(__name__)

STEPS = 64  # of one pass over the weights


def replay(
    model: nn.Module,
    journal: Journal,
    to_step: int | None = None,
    *,
    method: Method | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Take the base model of a run to the weights before its step `to_step` (None: after its last); returns that step.

    method: that of the run, for a journal of kind "rerun" whose method was made by hand.  progress: called with the
    step that has been reached.  Raises InputError for another base model, and for a step that the journal does not
    reach; the weights are untouched then."""
    header, records = journal.header, journal.upto(to_step)
    blocks = matching_blocks(model, journal)
    if header.kind == "sum":
        _replay_sums(blocks, header, records, progress)
    else:
        engine = engine_of(model, journal, method)
        rerun(engine, journal, to_step, progress)
        engine.flush()
        if method is None:  # engine and method hold each other until the collector comes
            engine.method.release()
    return header.first_step + len(records)


def engine_of(model: nn.Module, journal: Journal, method: Method | None = None) -> Engine:
    """An engine at the first step of a journal, without one of its own.  InputError where the method is needed and
    cannot be made again from the header."""
    header = journal.header
    if method is None:
        if not header.method:
            raise InputError(f"{journal.path}: its method ({header.method_name}) was made by hand: call "
                             f"replay(model, journal, method=...) with one like it")
        try:
            method = make_method(model=model, **header.method)
        except TypeError as error:
            raise InputError(f"{journal.path}: its method cannot be made again ({error})") from None
    engine = Engine(model, method, eps=header.eps, seed=header.seed, weight_decay=header.weight_decay,
                    limits=Limits(**header.limits), probing="auto" if method.low_rank else header.probing)  # fmt: skip
    engine.step_count = header.first_step
    return engine


def branch_off(model: nn.Module, place: str) -> int:
    """Take a run's base to a place of its journal, "JOURNAL:STEP"; returns the step.  Raises InputError."""
    path, _, step = place.rpartition(":")
    if not path or not step.isdecimal():
        raise InputError(f"branch {place}: give JOURNAL:STEP, such as run/journal.zoj:1000")
    return replay(model, read_journal(path), int(step))


@torch.no_grad()
def rerun(
    engine: Engine, journal: Journal, to_step: int | None = None, progress: Callable[[int], None] | None = None
) -> None:
    """Repeat the steps of a journal, from the engine's own to `to_step`, on the journalled losses: weights, method,
    counters are then what they were.  The engine keeps no journal meanwhile."""
    records = journal.upto(to_step)[engine.step_count - journal.header.first_step :]
    losses = torch.from_numpy(records["losses"].astype(numpy.float32)).to(engine.device)
    kept, engine.journal = engine.journal, None
    try:
        for record, given in zip(records, losses, strict=True):
            if record["flags"] & FLUSHED:
                engine.flush()
            try:
                engine.begin(float(record["lr"]))
            except UnstableRun:  # here the run was stopped, and then gone on with
                engine.begin(float(record["lr"]))
            engine.compute(Given(given))
            engine.end()
            if progress is not None:
                progress(engine.step_count)
    finally:
        engine.journal = kept


def matching_blocks(model: nn.Module, journal: Journal) -> Blocks:
    """The blocks of a journal in a model that is its base.  InputError naming the tensor that differs, or where the
    weights are others."""
    header, path = journal.header, journal.path
    if header.noise_contract != NOISE_VERSION:
        raise InputError(f"{path}: its noise is of contract {header.noise_contract}, this release makes "
                         f"{NOISE_VERSION}: replay it with zo-finetuner {header.versions.get('zo-finetuner', '')}")
    parameters = dict(model.named_parameters())
    for name, _, shape, dtype in header.tensors:
        if name not in parameters:
            raise InputError(f"{path}: trains {name}, which this model does not have: give the base model of the run")
        found = parameters[name]
        if list(found.shape) != shape or str(found.dtype) != f"torch.{dtype}":
            raise InputError(f"{path}: {name} is {dtype} {tuple(shape)}, in this model {str(found.dtype)[6:]} "
                             f"{tuple(found.shape)}: give the base model of the run, in its dtype")
    own = fingerprint(model)
    if own != header.fingerprint:
        what = "weights" if same_shapes(own, header.fingerprint) else "tensors"
        raise InputError(f"{path}: began with other {what} than this model's (fingerprint {header.fingerprint}, here "
                         f"{own}): give the base model of the run, not a checkpoint")
    try:
        return Blocks(((name, parameters[name].detach()) for name in header.names), ids=header.ids)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def differences(header: Header, device: torch.device) -> list[str]:
    """What of backend, device and versions is not that of the run, where that may change bits; empty: bit-equal."""
    mine = here(device)
    found = [f"{name} {theirs} then, {ours} now" for name, theirs, ours in (
        ("backend", header.backend, mine["backend"]), ("device", header.device, mine["device"]),
    ) if theirs != ours]  # fmt: skip
    if header.kind == "sum" and header.dist == "rademacher":
        return []
    versions = {"zo-finetuner", "torch"} | ({"triton"} if header.backend == "triton" else set())
    ours = mine["versions"]
    found += [f"{name} {header.versions.get(name, '?')} then, {ours[name]} now"
              for name in sorted(versions) if header.versions.get(name) != ours[name]]  # fmt: skip
    return found


def _replay_sums(
    blocks: Blocks, header: Header, records: numpy.ndarray, progress: Callable[[int], None] | None
) -> None:
    layout, count = header.record, len(blocks)
    fixed = numpy.frombuffer(bytes.fromhex(header.fixed_scales), dtype="<f2").astype(numpy.float32)
    for first in range(0, len(records), STEPS):
        part = records[first : first + STEPS]
        columns = _columns(header, part)
        per_step = sum(map(len, columns))
        seeds = numpy.stack([seed for terms in columns for seed, _ in terms], axis=1)
        coefs = numpy.stack([coef for terms in columns for _, coef in terms], axis=1)
        decays, stochastic = numpy.ones((len(part), len(columns)), numpy.float32), [False] * len(columns)
        if layout.decay:
            decays[:, -1] = part["decay"][:, 0]
        stochastic[-1] = True
        scale = fixed if len(fixed) else None
        if layout.scales:
            scale = numpy.repeat(part["scales"].astype(numpy.float32), per_step, axis=0).reshape(-1, count)
        rounding = _derived(header, part, ROUNDING_PROBE).repeat(len(columns))

        def put(values: numpy.ndarray) -> Tensor:
            return torch.from_numpy(numpy.ascontiguousarray(values)).to(blocks.device)

        replay_(
            blocks, put(seeds.reshape(-1).view(numpy.int64)), put(coefs.reshape(-1)),
            None if scale is None else put(scale),
            passes=[len(terms) for terms in columns] * len(part),
            decays=put(decays.reshape(-1)) if layout.decay else None,
            rounding_seeds=put(rounding.view(numpy.int64)),
            stochastic=stochastic * len(part), dist=header.dist,
        )  # fmt: skip
        if progress is not None:
            progress(int(part["step"][-1]) + 1)


Column = tuple[numpy.ndarray, numpy.ndarray]  # seeds (uint64) and coefficients (fp32) of a term, for every step


def _columns(header: Header, records: numpy.ndarray) -> list[list[Column]]:
    """The passes over the weights that a step made, each a list of terms; the last is the update's.  In place these are
    the additions of `inplace._passes` and `InPlaceProbing.apply`, in their order and with their roundings."""
    seeds: dict[int, numpy.ndarray] = {}

    def seed(number: int) -> numpy.ndarray:
        if number not in seeds:
            seeds[number] = _derived(header, records, number)
        return seeds[number]

    if header.record.seeds:
        update = [(records["seeds"][:, k], records["coefs"][:, k]) for k in range(header.record.coefs)]
    else:
        update = [(seed(number), records["coefs"][:, k]) for k, number in enumerate(header.terms)]
    passes: list[list[Column]] = []
    standing, away = -1, []  # the direction that the weights are displaced along, and the term that displaces them
    for k, (direction, number) in enumerate(header.trail):
        coef = records["probes"][:, k]
        if direction >= 0 and direction == standing:
            passes.append([(seed(number), coef - away[0][1])])
        else:
            passes.append(_back(away) + ([(seed(number), coef)] if direction >= 0 else []))
        standing, away = direction, [(seed(number), coef)] if direction >= 0 else []
    back = _back(away, records["decay"][:, 0] if header.record.decay else None)
    return [terms for terms in passes if terms] + [back + update]


def _back(away: list[Column], decay: numpy.ndarray | None = None) -> list[Column]:
    return [(seed, -coef if decay is None else -coef * decay) for seed, coef in away]


def _derived(header: Header, records: numpy.ndarray, number: int) -> numpy.ndarray:
    return numpy.array([derive_seed(header.seed, int(step), number) for step in records["step"]], dtype=numpy.uint64)
