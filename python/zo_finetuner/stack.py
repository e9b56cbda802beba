"""Where the perturbed copies live while a module runs: a stack of reusable buffers, and a frame per module call."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Frame:
    """What one module call has swapped and taken from the stack."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._swapped: list[tuple[nn.Parameter, Tensor]] = []
        self._copies: list[tuple[Tensor, ...]] = []
        self._stack: ScratchStack | None = None
        self._mark = None

    def holds(self, parameter: nn.Parameter) -> bool:
        return any(p is parameter for p, _ in self._swapped)

    def take(self, stack: ScratchStack, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._stack is None:
            self._stack, self._mark = stack, stack.mark()
        return stack.take(shape, dtype)

    def swap(self, parameter: nn.Parameter, *copies: Tensor) -> None:
        """To the first of the copies; where a batch has several members, there is one for each."""
        self._swapped.append((parameter, parameter.data))
        self._copies.append(copies)
        parameter.data = copies[0]

    def turn(self, member: int) -> None:
        """To the copies of another member."""
        for (parameter, _), copies in zip(self._swapped, self._copies, strict=True):
            parameter.data = copies[member]

    def undo(self) -> None:
        for parameter, own in reversed(self._swapped):
            parameter.data = own
        if self._stack is not None:
            self._stack.release(self._mark)


class ScratchStack:
    """Byte buffers on one device used as a stack: a module that calls children keeps its slice below theirs.
    It grows on the first forward and then stays; its size is that of the deepest nesting of swapped modules.
    grown: how often it has."""

    ALIGN = 256

    def __init__(self, device: torch.device):
        self.device, self.grown = device, 0
        self._buffers: list[Tensor] = []
        self._top = (0, 0)  # buffer number, offset in it

    def mark(self) -> tuple[int, int]:
        return self._top

    def release(self, mark: tuple[int, int]) -> None:
        self._top = mark

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        number, offset = self._top
        if number < len(self._buffers) and offset + size > self._buffers[number].numel() and offset:
            number, offset = number + 1, 0
        if number == len(self._buffers):
            self.grown += 1
            self._buffers.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        elif offset + size > self._buffers[number].numel():  # free from its start on: replace it by a larger one
            self.grown += 1
            self._buffers[number] = torch.empty(0)  # given back first: never both at once
            self._buffers[number] = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._top = (number, -(-(offset + size) // self.ALIGN) * self.ALIGN)
        return self._buffers[number][offset : offset + size].view(dtype).view(shape)
