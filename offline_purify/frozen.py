"""A frozen decoder that has less to do: the same function of its tokens, in fewer passes over memory, and nothing
worked out that no answer hangs on. For training adapters on it, where most of the time goes to what lies between the
matrix products.

Shapes: B rows of T tokens, D hidden width, N tokens that are asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
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


class _Rotation(torch.autograd.Function):
    """x turned by its place, x * cos + (-x2, x1) * sin over the two halves of the last dimension, with no gradient for
    the angles: a turn back is the gradient of a turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = sin.shape[-1] // 2
        return _turned(grads[0], cos, sin.roll(half, -1), 1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    (first, second), (low, high) = x.chunk(2, -1), sin.chunk(2, -1)
    out = x * cos
    mine, other = out.chunk(2, -1)
    mine.addcmul_(second, low, value=sign)
    other.addcmul_(first, high, value=-sign)
    return out


_ROTARY = "apply_rotary_pos_emb"
"""The function by which transformers' models turn queries and keys; each family has one of its own by that name."""


@cache
def _lean_rotary(own: Callable[..., Any]) -> Callable[..., Any] | None:
    """The same as ``own``, if it takes and does what that of Llama does: names differ little, conventions do."""

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if cos.shape[-1] != q.shape[-1]:  # a part of each head alone is turned
            both: tuple[Tensor, Tensor] = own(q, k, cos, sin, unsqueeze_dim)
            return both
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)

    if inspect.signature(own).parameters.keys() != inspect.signature(rotary).parameters.keys():
        return None
    drawn = torch.Generator().manual_seed(0)
    q, k, angles = (torch.randn(shape, generator=drawn) for shape in ((2, 3, 4, 8), (2, 1, 4, 8), (1, 4, 8)))
    mine, theirs = (turn(q, k, angles.cos(), angles.sin()) for turn in (rotary, own))
    return rotary if all(torch.allclose(*pair, atol=1e-6) for pair in zip(mine, theirs, strict=True)) else None


def _merged(layer: Any) -> Callable[..., Any] | None:
    """A linear layer and the plain LoRA adapters that are on, none of which is trained, as one product; None for any
    other. The base's weight is not touched: its sum with the adapters is held beside it."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = not any(name in layer.lora_variant or layer.lora_bias[name] for name in active)
    whole = type(layer.base_layer) is nn.Linear and layer.base_layer.weight.dtype == torch.float32
    if not (active and plain and whole) or layer.disable_adapters or layer.merged or layer.training:
        return None
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    weight, bias = layer.base_layer.weight + sum(map(layer.get_delta_weight, active)), layer.base_layer.bias
    return lambda x: nn.functional.linear(x, weight, bias)


def _lean(module: Any) -> Callable[..., Any] | None:
    """What can stand in for a module's ``forward``, if anything can."""
    if hasattr(module, "variance_epsilon") and module.weight.dtype == torch.float32 and not module.weight.requires_grad:
        return lambda x: _FrozenNorm.apply(x, module.weight, module.variance_epsilon)
    if isinstance(module, LoraLinear):
        return _merged(module)
    forward: Any = type(module).forward
    own = getattr(forward, "__globals__", {}).get(_ROTARY)
    rotary = _lean_rotary(own) if own is not None and _ROTARY in forward.__code__.co_names else None
    if rotary is None:
        return None
    # The same code, with another function by that name: no other model sees it.
    names = forward.__globals__ | {_ROTARY: rotary}
    turned = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    turned.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(turned, module)


@contextmanager
def lean(model: nn.Module) -> Iterator[None]:
    """Within: a frozen model's RMS norms (those of Llama's kind, in fp32), rotary positions and adapters by fewer
    operations. What is trained within must ask for its gradient already; copies made within share what is held."""
    instead = {module: _lean(module) for module in model.modules() if "forward" not in vars(module)}
    changed: list[Any] = [module for module, forward in instead.items() if forward is not None]
    for module in changed:
        module.forward = instead[module]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


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
