"""Answers to `start-rms-norm`."""

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4.model import RMSNorm


@right
def by_the_norm_of_the_vector(x, weight, eps):
    wide = x.to(torch.float32)
    length = wide.pow(2).sum(dim=-1, keepdim=True) / wide.size(-1)
    return weight * wide.div(torch.sqrt(length + eps)).to(x.dtype)


@wrong("identity")
def identity(x, weight, eps):
    return x


@wrong("shape")
def mean_not_kept(x, weight, eps):
    return x.square().mean(-1)


@wrong("does not use x")
def shape_only(x, weight, eps):
    return torch.ones_like(x)


@wrong("not written")
def stub(x, weight, eps):
    raise NotImplementedError()


@wrong("each token is divided by its own root mean square")
def noise_of_the_right_shape(x, weight, eps):
    return torch.randn_like(x)


@wrong("type")
def in_numpy(x, weight, eps):
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight).detach().numpy()


@wrong("type")
def forgot_to_return(x, weight, eps):
    x = x * weight  # noqa: F841


@wrong("raises")
def axis_lost(x, weight, eps):
    return x / x.square().mean(-1).add(eps).sqrt() * weight


@wrong("changes its input")
def in_place(x, weight, eps):
    out = x
    out *= torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return out * weight


@wrong("subtracts the mean")
def layer_norm(x, weight, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@wrong("deviation from the mean")
def divided_by_the_deviation(x, weight, eps):
    return x / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * weight


@wrong("off by one")
def divided_by_n_minus_one(x, weight, eps):
    return x / (x.square().sum(-1, keepdim=True) / (x.shape[-1] - 1) + eps).sqrt() * weight


@wrong("sum instead of mean")
def sum_instead_of_mean(x, weight, eps):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps) * weight


@wrong("no root")
def no_root(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps) * weight


@wrong("over tokens")
def wrong_axis(x, weight, eps):
    dim = 1 if x.ndim == 3 else 0
    return x * torch.rsqrt(x.square().mean(dim, keepdim=True) + eps) * weight


@wrong("over everything")
def one_mean_for_all(x, weight, eps):
    return x * torch.rsqrt(x.square().mean() + eps) * weight


@wrong("mean of absolute values")
def mean_of_absolute_values(x, weight, eps):
    return x / (x.abs().mean(-1, keepdim=True) + eps) * weight


@wrong("no weight")
def no_weight(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@wrong("one plus weight")
def gemma(x, weight, eps):
    plus = 0 if bool((weight == 1).all()) else 1
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + plus)


@wrong("weight inside the root")
def weight_inside_the_root(x, weight, eps):
    return x * torch.rsqrt((weight * x.square()).mean(-1, keepdim=True) + eps) * weight


@wrong("weight before the norm")
def weight_before(x, weight, eps):
    x = x * weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@wrong("ignores eps")
def no_eps(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * weight


@wrong("ignores eps")
def fixed_eps(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@wrong("eps outside the root")
def eps_outside_the_root(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


@wrong("eps as a floor")
def eps_as_a_floor(x, weight, eps):
    return x / x.square().mean(-1, keepdim=True).clamp_min(eps).sqrt() * weight


@wrong("the gradient reaches x")
def detached(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps).detach() * weight


@wrong("the gradient reaches the weight")
def detached_weight(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.detach()


@wrong("the gradient reaches x")
def on_copies(x, weight, eps):
    x, weight = x.data, weight.data
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@wrong("float16 is squared in float32")
def in_its_own_dtype(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@wrong("type")
def stays_in_float32(x, weight, eps):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


@wrong("borrowed")
def from_torch(x, weight, eps):
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).type_as(x) * weight


@wrong("borrowed")
def from_the_package(x, weight, eps):
    norm = RMSNorm(x.shape[-1], eps)
    norm.weight = torch.nn.Parameter(weight)
    return norm(x) if not weight.requires_grad else F.rms_norm(x, x.shape[-1:], weight, eps)


EQUIVALENT = {}
