"""Mixture of experts: each token gets one routed expert, and all tokens share one more.

Shapes: T tokens (batch and time flattened), D hidden size, F expert width, E experts.
Source: Meta's `models/llama4/moe.py`; Llama 4 has no softmax here and no weight on an expert's output. Meta's and
Hugging Face's code run every expert on every token; only the chosen ones are computed here, with the same result.
"""

import weakref
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary


def grouped_mm(x_TD: Tensor, w_EDF: Tensor, counts_E: list[int]) -> Tensor:
    """Rows sorted by expert, each group times its own matrix: [T, D], [E, D, F] -> [T, F].

    counts_E: how many rows each expert has; 0 is fine. The single door to faster backends.
    """
    if not worth_padding(counts_E):
        return _GroupedProduct.apply(x_TD, w_EDF, counts_E)
    # All groups in one batched product, filled up with zeros to the largest one (R rows).
    experts, largest = len(counts_E), max(counts_E)
    counts = torch.tensor(counts_E, device=x_TD.device)
    gap_E = torch.arange(experts, device=x_TD.device) * largest - (counts.cumsum(0) - counts)
    slot_T = torch.arange(len(x_TD), device=x_TD.device) + gap_E.repeat_interleave(counts)  # row e * R + i of group e
    x_ERD = x_TD.new_zeros(experts * largest, x_TD.shape[1]).index_copy(0, slot_T, x_TD).view(experts, largest, -1)
    return _BatchedProduct.apply(x_ERD, w_EDF).flatten(0, 1).index_select(0, slot_T)


def worth_padding(counts_E: list[int]) -> bool:
    """Small groups (4 to 16 rows on average) are bound by reading and writing weights: padding rows up to four times
    costs little there, and two threads share experts better than they share one small product. Of smaller ones, a loop
    reads only those weights that are needed."""
    experts, rows = len(counts_E), sum(counts_E)
    small = 4 * experts <= rows <= 16 * experts
    return small and experts * max(counts_E) <= 4 * rows and torch.get_num_threads() > 1


class _BatchedProduct(torch.autograd.Function):
    """`torch.bmm` [E, R, D] @ [E, D, F] -> [E, R, F], whose weight gradient lies in kept memory."""

    @staticmethod
    def forward(ctx, x_ERD, w_EDF):
        ctx.save_for_backward(x_ERD, w_EDF)
        return torch.bmm(x_ERD, w_EDF)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ERF):
        x_ERD, w_EDF = ctx.saved_tensors
        grad_w_EDF = torch.bmm(x_ERD.mT, grad_ERF, out=_memory_for_gradient(w_EDF))
        return torch.bmm(grad_ERF, w_EDF.mT), grad_w_EDF


class _GroupedProduct(torch.autograd.Function):
    """A loop: one product a group, each written to its place in one result, and no row of padding.

    Left to itself, autograd would make a tensor of every expert's weight gradient and then copy all E into one.
    """

    @staticmethod
    def forward(ctx, x_TD, w_EDF, counts_E):
        ctx.save_for_backward(x_TD, w_EDF)
        ctx.counts_E = counts_E
        y_TF = x_TD.new_empty(len(x_TD), w_EDF.shape[-1])
        for expert, rows in _groups(counts_E):
            torch.mm(x_TD[rows], w_EDF[expert], out=y_TF[rows])
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TF):
        x_TD, w_EDF = ctx.saved_tensors
        grad_x_TD, grad_w_EDF = torch.empty_like(x_TD), _memory_for_gradient(w_EDF)
        rows = (tensor.split(ctx.counts_E) for tensor in (x_TD, grad_TF, grad_x_TD))
        for x, grad, grad_x, w, grad_w in zip(*rows, w_EDF.mT.unbind(), grad_w_EDF.unbind(), strict=True):
            torch.mm(grad, w, out=grad_x)
            torch.mm(x.T, grad, out=grad_w)  # 0 where an expert has no rows
        return grad_x_TD, grad_w_EDF, None


def _groups(counts_E: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of those experts that have any; with few tokens, views of all would cost most of the time."""
    end = 0
    for expert, count in enumerate(counts_E):
        start, end = end, end + count
        if count:
            yield expert, slice(start, end)


_spare = WeakTensorKeyDictionary()  # of each weight: memory for its gradient that no tensor lies in


def _memory_for_gradient(weight: Tensor) -> Tensor:
    """An empty tensor like `weight`, in the memory of an earlier gradient if that is gone.

    `zero_grad` frees a gradient, and the system takes back large memory and clears every page before it returns: with
    64 experts of 8 tokens each that took as long as the rest of the backward pass. The memory goes with the weight.
    """
    if weight.device.type != "cpu":
        return torch.empty_like(weight)
    spare = _spare.setdefault(weight, [])
    memory = spare.pop() if spare else torch.empty_like(weight, memory_format=torch.contiguous_format)
    lent = memory.view(torch.uint8).numpy()  # a new object; it goes when the last tensor in it goes
    weakref.finalize(lent, spare.append, memory).atexit = False
    return torch.from_numpy(lent).view(weight.dtype)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). A dense layer, and the shared expert."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """E SwiGLU networks whose weights lie in two tensors, used as `x @ W` (so not `nn.Linear`)."""

    def __init__(self, num_experts: int, hidden_size: int, width: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * width))  # gate first, then up
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, hidden_size))

    def forward(self, x_TD: Tensor, expert_T: Tensor) -> Tensor:
        """Send each token through its own expert; the others cost nothing.

        Sorting by expert turns the tokens into E contiguous groups, of which any may be empty.
        """
        if len(x_TD) == 1:  # decode: nothing to sort
            expert = int(expert_T)
            gate_TF, up_TF = (x_TD @ self.gate_up_proj[expert]).chunk(2, dim=-1)
            return (F.silu(gate_TF) * up_TF) @ self.down_proj[expert]
        order_T = expert_T.argsort(stable=True)
        counts_E = torch.bincount(expert_T, minlength=len(self.down_proj)).tolist()
        gate_TF, up_TF = grouped_mm(x_TD.index_select(0, order_T), self.gate_up_proj, counts_E).chunk(2, dim=-1)
        y_TD = grouped_mm(F.silu(gate_TF) * up_TF, self.down_proj, counts_E)
        return torch.empty_like(y_TD).index_copy(0, order_T, y_TD)  # back to token order


class MoE(nn.Module):
    """Router, routed experts and the shared expert of one layer."""

    def __init__(self, hidden_size: int, num_experts: int, expert_width: int):
        super().__init__()
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = Experts(num_experts, hidden_size, expert_width)
        self.shared_expert = FeedForward(hidden_size, expert_width)
        self.probe = None  # set by `trace`: called with the very routes that are about to be used

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, D] -> [batch, tokens, D]."""
        x_TD = x.flatten(0, -2)
        logits_TE = self.router(x_TD)
        logit_T, expert_T = logits_TE.max(dim=-1)  # of equal logits, the first expert wins
        score_T = logit_T.float().sigmoid().type_as(x)  # a sigmoid of the winner alone, not a softmax over experts
        if self.probe is not None:
            self.probe(x.shape[:-1], logits_TE, expert_T, score_T)
        # The score scales what goes IN. Scaling the output is a different function: SwiGLU is not linear.
        routed_TD = self.experts(x_TD * score_T[:, None], expert_T)
        return (routed_TD + self.shared_expert(x_TD)).view_as(x)
