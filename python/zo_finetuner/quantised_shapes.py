"""Stand-ins for the layers of a quantised base, of which `zo plan` sees shapes: no package and no GPU is needed.

    int8        torchao 0.18: a byte a weight; of every row an fp32 scale and a byte for its zero.  A product makes a
                copy of the layer's weight in the dtype of its input
    nf4         bitsandbytes, as documented: half a byte a weight; of 64 weights a byte, of 256 such bytes 4; two
                tables.  A product makes the scales in fp32 and the layer's weight in bfloat16
    bnb-int8    bitsandbytes, as documented: a byte a weight and an fp32 scale a row.  A product makes its input in int8
                and its output in int32; columns of outliers are not counted

Embeddings, norms and the head stay in floats, and so does GPT-2's Conv1D, which bitsandbytes would quantise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_finetuner.quantised import require_quantisation

BLOCK, NESTED = 64, 256  # weights of a scale in nf4, and scales of a scale of scales


def quantise_shapes(model: nn.Module, kind: str) -> nn.Module:
    """Put stand-ins in place of the layers of a model on the meta device that loading it with `quantize` would change;
    returns the model.  kind: one of `quantised.QUANTISATIONS`; else InputError."""
    require_quantisation(kind)
    head = model.get_output_embeddings()
    for module in [*model.modules()]:
        for name, layer in module.named_children():
            if type(layer) is nn.Linear and layer is not head:
                setattr(module, name, KINDS[kind](layer))
    return model


class _Packed(nn.Linear):
    """A layer whose weight is integers, with scales beside it."""

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        data, *beside = self.layout(layer.weight)
        self.weight = nn.Parameter(data, requires_grad=False)
        for number, tensor in enumerate(beside):
            self.register_buffer(f"scale{number}", tensor)

    def layout(self, weight: Tensor) -> list[Tensor]:
        """What is kept of a weight: the integers, and the scales."""
        raise NotImplementedError


class Int8(_Packed):
    def layout(self, weight: Tensor) -> list[Tensor]:
        rows = len(weight), 1
        return [weight.to(torch.int8), weight.new_empty(rows, dtype=torch.float32),
                weight.new_empty(rows, dtype=torch.int8)]  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """torchao's own operators, so that what is kept for a backward is too."""
        product = torch.mm(x.reshape(-1, self.in_features), self.weight.t().to(x.dtype))
        y = (product * self.scale0.to(x.dtype).flatten()).reshape(*x.shape[:-1], self.out_features)
        if self.bias is not None:
            y += self.bias
        return y


class _Product(torch.autograd.Function):
    """bitsandbytes keeps nothing of a product for the backward but the integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Packed) -> Tensor:
        return layer.product(x)


class _BitsAndBytes(_Packed):
    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class NF4(_BitsAndBytes):
    def layout(self, weight: Tensor) -> list[Tensor]:
        scales = -(-weight.numel() // BLOCK)
        floats = (-(-scales // NESTED), NESTED, 16, 1)  # scales of scales, the tables of both, their mean
        return [weight.new_empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8),
                weight.new_empty(scales, dtype=torch.uint8),
                *(weight.new_empty(count, dtype=torch.float32) for count in floats)]  # fmt: skip

    def product(self, x: Tensor) -> Tensor:
        scales = self.scale0.to(torch.float32)
        weight = self.weight.new_empty(self.out_features, self.in_features, dtype=torch.bfloat16)
        weight.copy_(self.weight[:1])  # counted as a pass that writes it
        del scales
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return F.linear(x.to(torch.bfloat16), weight, bias).to(x.dtype)


class BnbInt8(_BitsAndBytes):
    def layout(self, weight: Tensor) -> list[Tensor]:
        return [weight.to(torch.int8), weight.new_empty(len(weight), dtype=torch.float32)]

    def product(self, x: Tensor) -> Tensor:
        integers = x.reshape(-1, self.in_features).to(torch.int8)
        sums = torch.mm(integers, self.weight.t()).to(torch.int32)
        y = sums.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


KINDS: dict[str, type[_Packed]] = {"int8": Int8, "nf4": NF4, "bnb-int8": BnbInt8}
