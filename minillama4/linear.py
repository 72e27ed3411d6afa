"""Products of one single row, which cost what it takes to read the matrix: that is decoding, one token at a time.

On a CPU the ordinary matrix-vector product (MKL's) reads [1024, 256] fp32 at 8 GB/s, a batch of two products at 32 (two
cores of an AMD EPYC, November 2026). So a row is multiplied with two halves of its matrix, as a batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 1 << 15  # numbers in a matrix: below this the batch costs more than it saves


class Linear(nn.Linear):
    """`nn.Linear` without bias: [..., inputs] -> [..., outputs]. One row alone takes the fast way."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight  # [outputs, inputs]
        outputs, inputs = weight.shape
        if x.numel() != inputs or outputs % 2 or weight.numel() < SMALL or x.device.type != "cpu":
            return F.linear(x, weight)
        column = x.reshape(1, 1, inputs).mT.expand(2, -1, -1)  # [2, inputs, 1]; strided so, MKL takes its fast path
        return torch.bmm(weight.view(2, -1, inputs), column).view(*x.shape[:-1], outputs)


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """[1, inputs] @ [inputs, outputs], for weights that lie the other way round, as those of experts do."""
    inputs, outputs = weight.shape
    if inputs % 2 or weight.numel() < SMALL or x.device.type != "cpu" or torch.get_num_threads() == 1:
        return x @ weight
    return torch.bmm(x.reshape(2, 1, -1), weight.view(2, -1, outputs)).sum(0)
