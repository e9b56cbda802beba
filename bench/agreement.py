"""What must agree before a time means anything: the same direction in every pass, and on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.operations import EPS, TENSOR_ID
from bench.runner import Runner
from zo_kernels import Blocks, draw_noise, perturb_, scratch, seed_tensor, update_, update_scratch_, use_backend
from zo_kernels import why_unavailable as missing


def same_z(runner: Runner, n: int) -> None:
    """Elements in which a pass draws another direction than `draw_noise`: every op on weights of zero, whole and
    sharded, aligned and not.  n is odd, so that vector bodies leave a tail."""
    device, shift = runner.device, n // 3 | 1
    seeds, seed = seed_tensor([5, 8], device), seed_tensor(5, device)
    one, nothing = torch.ones((), device=device), torch.zeros(1, device=device)

    def zeros(count: int = n, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    def perturbed(theta: Tensor, offset: int = 0) -> Tensor:
        perturb_(Blocks([("theta", theta)], ids={"theta": TENSOR_ID}, offsets=[offset]), seed, one)
        return theta

    def probed(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        out, mirror = zeros(dtype=dtype), zeros(dtype=dtype)
        scratch(zeros(dtype=dtype), out, TENSOR_ID, seed, one, mirror=mirror)
        return out, mirror

    def updated() -> Tensor:
        theta, coefs = zeros(), torch.tensor([1.0, 0.0], device=device)
        update_(Blocks([("theta", theta)], ids={"theta": TENSOR_ID}), seeds, coefs)
        return theta

    def followed() -> Tensor:
        out = zeros()
        update_scratch_(zeros(), out, TENSOR_ID, seeds[1:].clone(), nothing, None, seed, one)
        return out

    with runner.guard("same z"), use_backend(runner.ours):
        z = draw_noise(n, seed, TENSOR_ID)
        out, mirror = probed()
        half, other_half = probed(torch.bfloat16)
        pairs = {
            "perturb": (perturbed(zeros()), z),
            "misaligned": (perturbed(zeros(n + 1)[1:]), z),
            "shard": (perturbed(zeros(n - shift), shift), z[shift:]),
            "two-noise": (updated(), z),
            "scratch": (out, z),
            "mirror": (mirror, -z),
            "update scratch": (followed(), z),
            "perturb, bfloat16": (perturbed(zeros(dtype=torch.bfloat16)), half),
            "mirror, bfloat16": (other_half, -half),
        }
        different = {name: int((a != b).sum()) for name, (a, b) in pairs.items()}
        total = [float(sum(different.values()))]
        runner.record("same z", runner.ours, torch.float32, n, total, "different_elements", "", passes=different)


def twin(runner: Runner, n: int) -> None:
    """The largest difference of a normal from the CPU's, and the largest share of the contract's error budget against
    the float64 reference: 1e-6 + 2e-6 r, plus min(6e-4, 4e-7 / r) on a GPU."""
    other = "reference" if runner.ours == "cpu" or missing("cpu") else "cpu"
    with runner.guard("twin"):
        z = {}
        for name, backend, device in (("ours", runner.ours, runner.device), ("twin", other, "cpu")):
            with use_backend(backend):
                z[name] = draw_noise(n, seed_tensor(5, device), TENSOR_ID).double().cpu()
        with use_backend("reference"):
            exact = draw_noise(n, seed_tensor(5), TENSOR_ID).double()
        radius = exact.view(-1, 2).norm(dim=1).repeat_interleave(2)
        budget = 1e-6 + 2e-6 * radius
        if runner.device.type == "cuda":
            budget += (4e-7 / radius).clamp(max=6e-4)
        for metric, values in (
            ("max_abs_difference", (z["ours"] - z["twin"]).abs()),
            ("share_of_budget", (z["ours"] - exact).abs() / budget),
        ):
            runner.record("twin", runner.ours, torch.float32, n, [values.max().item()], metric, "", twin=other)


def changed(runner: Runner, n: int) -> None:
    """Share of bf16 weights N(0, .02^2) that a pair of probes at eps 1e-3 leaves changed: MeZO's +eps, -2 eps, +eps in
    the storage dtype, and two scratch probes, which write another tensor."""
    with runner.guard("changed"), use_backend(runner.ours):
        before = (torch.randn(n, device=runner.device) * 0.02).to(torch.bfloat16)
        theirs, ours, out = before.clone(), before.clone(), torch.empty_like(before)
        z = torch.normal(mean=0, std=1, size=before.size(), dtype=before.dtype, device=runner.device)
        for sign in (1, -2, 1):
            theirs = theirs + sign * z * EPS
        seed, above = (t.to(runner.device) for t in (seed_tensor(5), torch.tensor(1.0)))
        for sign in (1, -1):
            coef = torch.tensor(sign * EPS, device=runner.device)
            scratch(ours, out, TENSOR_ID, seed, coef, nearest_above=above)
        for provider, after in ((runner.ours, ours), ("torch", theirs)):
            share = (after != before).float().mean().item()
            runner.record("changed", provider, torch.bfloat16, n, [share], "share", "")
