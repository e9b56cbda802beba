"""The exact derivative of a loss along a direction, by forward-mode differentiation (dual numbers), no backward pass.

Every trainable parameter of the model is a dual tensor while the closure runs once; afterwards the parameters are back
in their places, after an exception too.  Memory: the direction of all weights in their dtype, the activations twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zo_finetuner.optim.base import Probe
from zo_finetuner.optim.directions import Direction
from zo_kernels import Blocks


def directional_derivative(
    model: nn.Module, blocks: Blocks, direction: Direction, loss_fn: Callable[[], Any]
) -> tuple[Tensor, Tensor]:
    """The loss at theta and its derivative along the direction, as windows (`window.py`).  RuntimeError where an
    operator has no forward mode, or the loss is a number or does not come from the weights.  Fused attention has none:
    the plain form runs instead."""
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _dual(model, blocks, direction):
        loss = loss_fn()
        parts = forward_ad.unpack_dual(loss) if isinstance(loss, Tensor) else None
        if parts is None or parts.tangent is None:
            raise RuntimeError("the loss has no derivative along the weights: return it as a tensor, not detached, "
                               "computed outside of torch.inference_mode")
        value, slope = parts.primal.float(), parts.tangent.float()
        return value, slope if value.dim() == 0 else torch.stack((slope[0], value[1]))


@contextlib.contextmanager
def _dual(model: nn.Module, blocks: Blocks, direction: Direction) -> Iterator[None]:
    one = torch.ones((), dtype=torch.float32, device=blocks.device)
    move = Probe(direction, one).stacked
    block_of = {id(p): blocks.index[name] for name, p in model.named_parameters() if name in blocks.index}
    duals: dict[int, Tensor] = {}
    own = [(module, dict(module._parameters)) for module in model.modules() if module._parameters]
    try:
        for module, parameters in own:
            for name, parameter in parameters.items():
                block = block_of.get(id(parameter))
                if block is not None and block not in duals:
                    theta = blocks.tensors[block]
                    along = move.displacement(theta, blocks.ids[block], block).to(theta.dtype)
                    duals[block] = forward_ad.make_dual(theta, along)
                if block is not None:
                    module._parameters[name] = duals[block]
        yield
    finally:
        for module, parameters in own:
            module._parameters.update(parameters)
