"""A plan for people and for programs: a one-line verdict, a short table, the same numbers as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from zo_finetuner.devices import CONTEXT, COPY, FRAGMENTS, MATMUL, Device
from zo_finetuner.plan import Plan

GIB = 1 << 30
BITSANDBYTES = "The base is counted by bitsandbytes' layout as it is documented; none was measured."


def as_json(plan: Plan, devices: Sequence[Device]) -> dict[str, Any]:
    """Bytes, seconds, counts.  Everything is predicted but the rates of this CPU."""
    memory = dataclasses.asdict(plan.memory)
    totals = {"peak": plan.memory.peak, "ratio": plan.memory.ratio, "adam": plan.memory.adam}
    return {
        "predicted": True,
        **{k: v for k, v in vars(plan).items() if k not in ("memory", "work", "dtype")},
        "dtype": str(plan.dtype).removeprefix("torch."),
        "memory": memory | totals,
        "work": dataclasses.asdict(plan.work),
        "devices": [_on(plan, device) for device in devices],
    }


def _on(plan: Plan, device: Device) -> dict[str, Any]:
    entry = {"name": device.name, "memory_gib": device.memory, "fits": device.holds(plan.memory.peak)}
    if device.bandwidth:
        forwards, passes = plan.work.seconds(device, plan.dtype)
        entry |= {"forwards_s": forwards, "passes_s": passes, "step_s": forwards + passes}
    return entry


def verdict(plan: Plan, devices: Sequence[Device]) -> str:
    """One line: the peak, its ratio to inference, and what it fits."""
    entries = [_on(plan, device) for device in devices]
    peak = f"peak {_gib(plan.memory.peak)} GiB, {plan.memory.ratio:.3f}x inference on the same batch"
    if len(entries) == 1:
        entry = entries[0]
        step = f", {_time(entry['step_s'])} a step" if "step_s" in entry else ""
        fits = "fits" if entry["fits"] else "does NOT fit"
        return f"predicted: {fits} {entry['name']} ({entry['memory_gib']:.1f} GiB): {peak}{step}"
    fitting = [entry["name"] for entry in entries if entry["fits"]]
    return f"predicted: {peak}; fits {', '.join(fitting) if fitting else 'none of the GPUs below'}"


def report(plan: Plan, devices: Sequence[Device]) -> str:
    m, signs = plan.memory, "both signs" if plan.probing == "paired" else "one sign"
    if plan.probing == "lowrank":
        signs = "of a step's probes"
    copies = f"scratch: {plan.largest} at most, {signs}" if m.scratch else "scratch: none, the weights themselves move"
    rows = [
        ("weights and buffers, batch", m.weights),
        (copies, m.scratch),
        ("activations: most tensors alive at once before the head", m.activations),
        ("logits and loss: the same from the head on (the larger counts)", m.logits),
        ("CUDA graphs: a captured step's own", m.pool),
        ("method: state of every weight, nets, scales, statistics", m.method),
        ("kernel tables", m.tables),
        ("first step: its scratch grows and its rounding is checked", m.first),
    ]
    if m.first <= m.scratch + max(m.activations, m.logits) + m.pool:
        rows.pop()
    totals = [
        ("peak", m.peak),
        ("inference on the same batch", m.inference),
        ("first-order Adam: weights, gradients, moments, kept activations", m.adam),
        ("learning scales: fp32 weights, activations, largest gradients", m.learning),
    ]
    dtype = str(plan.dtype).removeprefix("torch.")
    lines = [
        verdict(plan, devices),
        "",
        plan.model,
        f"  {plan.architecture}, {plan.parameters:,} parameters in {dtype}; {plan.optimizer}, {plan.probing} probing; "
        f"{plan.task}, {plan.batch} x {plan.seq} tokens",
        *(f"  {name:<66}{_gib(size):>9} GiB" for name, size in rows),
        *(f"  {name:<66}{_gib(size):>9} GiB{size / m.inference:>8.3f}x" for name, size in totals),
        "",
        f"  {'device':<28}{'memory':>10}{'fits':>6}{'forwards':>11}{'passes':>11}{'step':>11}",
        *(_line(_on(plan, device)) for device in devices),
        "",
        *_assumptions(plan, devices),
    ]
    return "\n".join(lines)


def _line(entry: dict[str, Any]) -> str:
    times = [_time(entry[key]) if key in entry else "?" for key in ("forwards_s", "passes_s", "step_s")]
    fits = "yes" if entry["fits"] else "no"
    return f"  {entry['name']:<28}{entry['memory_gib']:>6.1f} GiB{fits:>6}" + "".join(f"{t:>11}" for t in times)


def _assumptions(plan: Plan, devices: Sequence[Device]) -> list[str]:
    work = plan.work
    layout = [BITSANDBYTES] if plan.quantize in ("nf4", "bnb-int8") else []
    counted = (
        f"Forwards: {work.forwards}, {work.flops / 1e12:.3g} TFLOP, {work.read / 1e9:.3g} GB of weights read, "
        f"{work.traffic / 1e9:.3g} GB moved besides products.  Passes move {work.moved / 1e9:.3g} GB."
    )
    if all(device.measured for device in devices):
        return [counted, *layout, "Rates were measured on this CPU."]
    return [
        counted,
        *layout,
        f"Assumed: products at {MATMUL} of the dense datasheet rate, bytes at {COPY} of the memory's; besides tensors",
        f"{CONTEXT / GIB:.1f} GiB of CUDA context and {FRAGMENTS:.0%} lost to the allocator.  Not counted: launches,",
        f"which the {work.operators} operators of a forward wait for outside a CUDA graph.",
    ]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= GIB // 10 else f"{size / GIB:.4f}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
