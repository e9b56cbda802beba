"""Several processes on one run: what they share are losses, a few bytes for every probe and micro-batch.

    layout    rank = data * PROBES + probe.  Ranks of one `probe` differ in their rows, those of one `data` in the
              probes that they evaluate
    losses    a (loss sum, weight) pair per probe and micro-batch, gathered from all ranks by one collective, put in the
              order in which one process would see them, and reduced as it would (`window.py`)
    noise     a function of seed, tensor and element, so nobody sends any: every rank applies the whole update to its
              replica, or to its shard

Micro-batch m of data rank d is number m * DATA + d of the step, as torch's and accelerate's samplers deal them.  On one
kind of device the losses, and so the weights, are those of one process to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zo_finetuner.errors import InputError, RunStopped
from zo_finetuner.optim.base import Method, Probe, Slope
from zo_finetuner.replicas import combined, fingerprints, first_difference
from zo_finetuner.shards import ShardBlocks
from zo_finetuner.window import flat, pairs, total
from zo_kernels import Blocks

TIMEOUT = 600.0  # seconds that a rank may be behind the others
CHECK_EVERY = 100  # steps


class RankLost(RunStopped):
    """Another rank has died, or has not answered in time.  This rank's weights are whole."""


class ReplicasDiffer(RunStopped):
    """Ranks that hold the same weights do not, bit for bit."""


def join(timeout: float = TIMEOUT) -> None:
    """Start torch.distributed if this process was started as one of several (by torchrun, by accelerate), unless it
    runs already: NCCL between GPUs, gloo between CPUs.  timeout: seconds that a collective waits for a rank."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            backend = "cuda:nccl,cpu:gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def joined() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leave() -> None:
    """The end of `join`: all ranks come here together."""
    if joined():
        dist.destroy_process_group()


def leads() -> bool:
    """Whether this is the process that speaks and writes: the first, or the only one."""
    return not joined() or dist.get_rank() == 0


def divided(batch_size: int, grad_accum: int, data_ranks: int) -> tuple[int, int]:
    """Rows in a micro-batch and micro-batches in a window for each of so many ranks, which together take the step that
    one process would: whole micro-batches where they divide, else each is divided.  InputError where neither does."""
    if grad_accum % data_ranks == 0:
        return batch_size, grad_accum // data_ranks
    if batch_size % data_ranks == 0:
        return batch_size // data_ranks, grad_accum
    raise InputError(f"neither {grad_accum} micro-batches (grad_accum) nor their {batch_size} rows (batch_size) divide "
                     f"among {data_ranks} ranks: give --grad-accum {data_ranks}, or another number of processes")


class Ranks:
    """The processes of a run, seen from one of them.

    probes: how many ranks share the probes of a step (probe-parallel); size / probes share its rows (data-parallel).
    check_every: steps between comparisons of the replicas, 0 for never.
    sent: bytes that this rank has given to collectives so far; received: that it got from the others.

    Raises InputError where the size is no multiple of probes."""

    def __init__(self, probes: int = 1, *, check_every: int = CHECK_EVERY):
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        if probes < 1 or self.size % probes:
            raise InputError(f"{self.size} processes do not divide among {probes} probe ranks: choose a divisor")
        self.probes, self.data, self.check_every = probes, self.size // probes, check_every
        self.data_rank, self.probe_rank = divmod(self.rank, probes)
        self.sent = self.received = self.steps = 0

    def probing(self, mode: str, method: Method, blocks: Blocks) -> str:
        """The mode of probing for ranks that share a method's probes: one that never writes a weight, since in place
        the way from probe to probe is in the last bits of a replica.  InputError for a method that has not a probe for
        every probe rank."""
        if self.probes == 1:
            return mode
        if isinstance(blocks, ShardBlocks):
            raise InputError("several probe ranks do not go with sharded weights, whose forward all ranks share")
        forwards = method.forwards // 2 if method.slopes else method.forwards
        if forwards < self.probes:
            raise InputError(f"{self.probes} probe ranks, but a step of {method.name} has {forwards} forwards")
        if mode == "inplace":
            raise InputError("probing inplace does not go with several probe ranks, whose replicas it would part: "
                             "use --probing scratch")
        return "scratch" if mode == "auto" and not method.low_rank else mode

    def share(self, request: Sequence[Probe | Slope]) -> list[Any]:
        """The probes of a request that this rank evaluates."""
        return [request[i] for i in shares(request, self.probes)[self.probe_rank]]

    def losses(self, request: Sequence[Probe | Slope], mine: list[Tensor]) -> Tensor:
        """(probes,) fp32 of the whole request, from every rank's windows of `share`; of a slope, two numbers.

        mine: for every probe what `window.as_window` gave, for a slope a pair of such."""
        numbers = flat(mine)
        message = torch.stack([pairs(window) for window in numbers])
        parts = shares(request, self.probes)
        values = len(numbers) // len(parts[self.probe_rank])  # of a probe: 1, or 2 of a slope
        most = values * max(map(len, parts))
        if len(message) < most:
            message = torch.cat((message, message.new_zeros(most - len(message), *message.shape[1:])))
        gathered = self.gather(message).view(self.data, self.probes, most, 2, -1)
        losses: list[Tensor] = [message.new_empty(0)] * (values * len(request))
        for owner, numbers_of in enumerate(parts):
            for place, number in enumerate(numbers_of):
                for value in range(values):
                    window = gathered[:, owner, values * place + value].permute(1, 2, 0)  # (2, M, data)
                    losses[values * number + value] = total(window.reshape(2, -1))
        return torch.stack(losses)

    def gather(self, message: Tensor) -> Tensor:
        """(size, *message.shape): those of all ranks, in their order.  Raises RankLost."""
        own = message.contiguous()
        wire = own if _travels(own.device) else own.cpu()
        out = wire.new_empty(self.size, *wire.shape)
        try:
            dist.all_gather(list(out.unbind()), wire)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]  # without gloo's place and advice
            raise RankLost(f"a rank has died or does not answer, rank {self.rank} was told: {reason}") from error
        self.sent += wire.nbytes
        self.received += (self.size - 1) * wire.nbytes
        return out.to(own.device)

    def require_replicas(self, blocks: Blocks, step: int) -> None:
        """After the first step and every `check_every`: ReplicasDiffer naming the first tensor that ranks of the same
        weights hold differently.  Waits for the device."""
        self.steps = step + 1
        due = self.check_every and (step == 1 or step and step % self.check_every == 0)
        if not due or isinstance(blocks, ShardBlocks):
            return
        mine = fingerprints(blocks)
        if len(set(self.gather(combined(mine)).tolist())) > 1:
            block, ranks = first_difference(self.gather(mine))
            raise ReplicasDiffer(
                f"the replicas differ at step {step}: {blocks.names[block]} is not the same on ranks 0 and "
                f"{ranks[0]} ({len(ranks)} of {self.size} ranks differ from rank 0)"
            )

    def traffic(self) -> dict[str, Any]:
        """For a report: what a step has cost on the wire, comparisons of replicas included."""
        steps = max(self.steps, 1)
        return {
            "processes": self.size,
            "data_ranks": self.data,
            "probe_ranks": self.probes,
            "sent_bytes_per_step": self.sent / steps,
            "received_bytes_per_step": self.received / steps,
        }


def shares(request: Sequence[Probe | Slope], ranks: int) -> list[list[int]]:
    """For each of so many ranks the numbers of the probes that it evaluates, at least one.  Those of one direction
    stay together (both signs from one noise) unless there are fewer directions than ranks; ranks that would have none
    repeat another's."""
    units = [list(run) for _, run in groupby(range(len(request)), key=lambda i: id(request[i].direction))]
    if len(units) < ranks:
        units = [[i] for i in range(len(request))]
    units += [units[i % len(units)] for i in range(len(units), ranks)]
    return [sorted(number for unit in units[r::ranks] for number in unit) for r in range(ranks)]


def _travels(device: torch.device) -> bool:
    """Whether a collective takes tensors of this device: NCCL's are on GPUs, gloo's on the host."""
    return device.type == "cpu" or "nccl" in dist.get_backend_config()
