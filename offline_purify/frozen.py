"""A frozen decoder that has less to do: the same function of its tokens, in fewer passes over memory, and nothing
worked out that no answer hangs on. For training adapters on it, where most of the time goes to what lies between the
matrix products.

Shapes: B rows of T tokens, D hidden width, N tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offline_purify.train import IGNORED


class _FrozenNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension, with no gradient for the weight: what automatic differentiation of
    the plain formula reads and writes twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        normed, inverse, weight = ctx.saved_tensors
        grad = grads[0] * weight
        along = (grad * normed).sum(-1, keepdim=True).div_(-normed.shape[-1])
        return torch.addcmul(grad, normed, along).mul_(inverse), None, None


@contextmanager
def lean_norms(model: nn.Module) -> Iterator[None]:
    """Within: a frozen model's RMS norms (those of Llama's kind, in fp32) by fewer operations."""
    norms: list[Any] = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    norms = [norm for norm in norms if norm.weight.dtype == torch.float32 and not norm.weight.requires_grad]

    def lean(norm: Any) -> Any:
        return lambda x: _FrozenNorm.apply(x, norm.weight, norm.variance_epsilon)

    for norm in norms:
        norm.forward = lean(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def last_mlp(model: nn.Module) -> nn.Module | None:
    """The MLP of a decoder's last block, after which no token sees another; None where no module is called so."""
    return next((module for name, module in reversed([*model.named_modules()]) if name.endswith(".mlp")), None)


@contextmanager
def answers_alone(mlp: nn.Module | None, labels: Tensor, groups: int) -> Iterator[None]:
    """Within: the last block's ``mlp`` meets the tokens alone that an answer is read from, and says 0 of all others.

    labels int64 [B, T], -100 off the answers. What the mlp gets is [N, D], as many tokens for each of ``groups`` of
    B / groups rows one after the other (some for nothing, where a group asks for fewer).
    """
    if mlp is None:
        yield
        return
    asked = torch.zeros_like(labels, dtype=torch.bool)
    asked[:, :-1] = labels[:, 1:] != IGNORED
    group, place = asked.view(groups, -1).nonzero(as_tuple=True)
    count = group.bincount(minlength=groups)
    token = place + group * (labels.numel() // groups)
    slot = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group]
    slot += group * count.max()
    taken = torch.zeros(groups * int(count.max()), dtype=torch.long, device=labels.device)
    taken[slot] = token

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, 1)[taken],)

    def after(_: nn.Module, __: object, output: Tensor) -> Tensor:
        everywhere = output.new_zeros(labels.numel(), output.shape[-1])
        return everywhere.index_copy(0, token, output[slot]).view(*labels.shape, -1)

    handles = mlp.register_forward_pre_hook(before), mlp.register_forward_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
