"""Many LoRA adapters over one frozen model, trained together: one batched pass instead of one training each.

A bank holds K adapters of the same shape. While it is open, the rows of a batch belong to the adapters in turn (the
first K-th to the first adapter, and so on), and every target layer adds to each row what its own adapter says. Nothing
couples the adapters: losses are summed, gradients clipped adapter by adapter, and AdamW works on single elements, so
each comes out as it would have alone (to numerical tolerance: matrix products are batched otherwise). Processors share
the adapters out, a bank for each: products this small are done sooner by one thread each than by all of them in turn.

Shapes: K adapters, R LoRA rank, B rows per adapter in a batch, T tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offline_purify.architectures import features
from offline_purify.frozen import answers_alone, last_mlp, lean
from offline_purify.train import Example, Progress, TrainConfig, answer_sums, collate, index_batches, learning_rate

_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s
# Tokens (padding included) that a processor takes at a time, so that what lies between the layers is small enough to be
# reused. Three adapters with 16 rows of 122 tokens each, 6M parameters: 1.8 to 2.6 s a step and adapter in one go, 0.55
# to 0.60 s in parts of 1,000 to 4,000 tokens (processor seconds, one thread).
_CACHED_TOKENS = 2000


_SHARED_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Layers of a block that read the same input: their A factors lie in one tensor, and meet it once."""


@dataclass(frozen=True)
class _Target:
    module: nn.Module
    group: str
    place: int  # in the group's A
    b: nn.Parameter  # [K, R, out]: so that its gradient, and that of what it meets, are products of long rows


class LoraBank:
    """K fresh adapters on the named linear layers of `model`, all begun alike.

    model: any module, itself left as it is; targets: names of linear layers or Conv1Ds (a layer that carries another
    adapter is one). A is drawn as PEFT draws it, from `seed`, the same for all K; B is zero.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str], count: int, rank: int, scaling: float, seed: int):
        if not targets:
            raise ValueError("no layers were named to put adapters on.")
        self.model, self.count, self.scaling = model, count, scaling
        generator = torch.Generator().manual_seed(seed)
        self.targets: dict[str, _Target] = {}
        drawn: dict[str, list[Tensor]] = {}
        for name in targets:
            module: Any = model.get_submodule(name)
            weight = next(module.parameters())
            wide, high = features(module)
            bound = 1 / math.sqrt(wide)  # Kaiming-uniform with a = sqrt(5)
            a = (2 * torch.rand(rank, wide, generator=generator) - 1) * bound
            group = _group(name)
            own = drawn.setdefault(group, [])
            b = nn.Parameter(torch.zeros(count, rank, high, device=weight.device))
            self.targets[name] = _Target(module, group, len(own), b)
            own.append(a.to(weight.device))
        self._a = {group: nn.Parameter(torch.cat(own).expand(count, -1, -1).clone()) for group, own in drawn.items()}

    def parameters(self) -> list[nn.Parameter]:
        """All factors, each with the K adapters in front."""
        return [*self._a.values(), *(target.b for target in self.targets.values())]

    def factors(self, name: str, k: int) -> tuple[Tensor, Tensor]:
        """lora_B [out, R] and lora_A [R, in] of adapter k at one layer."""
        target = self.targets[name]
        rank = target.b.shape[1]
        return target.b[k].mT.detach(), self._a[target.group][k, rank * target.place :][:rank].detach()

    @contextmanager
    def open(self, only: int | None = None) -> Iterator[nn.Module]:
        """Within: the model with the adapters on it; with `only` all rows belong to that adapter."""

        def of(factors: Tensor) -> Tensor:
            return factors if only is None else factors[only : only + 1]

        met: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}

        def add(target: _Target) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                b, group = of(target.b), target.group
                if group not in met or met[group][0] is not inputs[0]:
                    x = inputs[0].reshape(len(b), -1, inputs[0].shape[-1])
                    met[group] = inputs[0], (x @ of(self._a[group]).mT).split(b.shape[1], -1)
                told = output.reshape(len(b), -1, output.shape[-1])
                return torch.baddbmm(told, met[group][1][target.place], b, alpha=self.scaling).view_as(output)

            return hook

        handles = [target.module.register_forward_hook(add(target)) for target in self.targets.values()]
        try:
            with lean(self.model):
                yield self.model
        finally:
            for handle in handles:
                handle.remove()
            met.clear()


def _group(name: str) -> str:
    block, _, last = name.rpartition(".")
    alike = next((sorted(names) for names in _SHARED_INPUT if last in names), [last])
    return f"{block}.{'|'.join(alike)}"


Adapter = tuple[LoraBank, int]
"""One adapter: its bank, and its place in there."""


def train_adapters(
    model: nn.Module,
    targets: Sequence[str],
    sets: Sequence[Sequence[Example]],
    rank: int,
    scaling: float,
    config: TrainConfig,
    *,
    pad_id: int,
    together: int,
    progress: Progress | None = None,
    what: str = "training together",
) -> list[Adapter]:
    """A fresh adapter for each of `sets`, trained on it as `train` would alone; `model` is left as it was.

    On a CPU every thread that torch may use trains a share of them, over weights that all share; on a GPU they are
    trained in one pass. At most `together` share a pass: half as many as did not fit a GPU's memory. Raises ValueError
    for sets that are not all of one size.
    """
    threads = min(torch.get_num_threads(), len(sets)) if next(model.parameters()).device.type == "cpu" else 1

    def passes(body: nn.Module, share: Sequence[Sequence[Example]], watch: Progress | None) -> list[Adapter]:
        found: list[Adapter] = []
        most = together
        while len(found) < len(share):
            some = share[len(found) :][:most]
            bank = LoraBank(body, targets, len(some), rank, scaling, config.seed)
            try:
                train_bank(bank, some, config, pad_id=pad_id, progress=watch, what=what)
            except torch.OutOfMemoryError:
                if len(some) == 1:
                    raise
                most = len(some) // 2
            else:
                found += [(bank, place) for place in range(len(some))]
        return found

    with _frozen(model), lean(model), _one_thread_each(threads), ThreadPoolExecutor(threads) as pool:
        weights = {id(t): t for t in (*model.parameters(), *model.buffers())}
        bodies = [model, *(copy.deepcopy(model, dict(weights)) for _ in range(1, threads))]
        shares = [sets[len(sets) * i // threads : len(sets) * (i + 1) // threads] for i in range(threads)]
        # Every share has as many steps: one of them tells.
        found = pool.map(passes, bodies, shares, [progress, *[None] * (threads - 1)])
        return [adapter for some in found for adapter in some]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within: no weight of the model asks for a gradient, and it is in evaluation mode."""
    before, was_training = {p: p.requires_grad for p in model.parameters()}, model.training
    try:
        for p in before:
            p.requires_grad_(False)
        model.eval()
        yield
    finally:
        for p, flag in before.items():
            p.requires_grad_(flag)
        model.train(was_training)


@contextmanager
def _one_thread_each(threads: int) -> Iterator[None]:
    """Within: operations of as many threads as there are use one processor each."""
    before = torch.get_num_threads()
    try:
        if threads > 1:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def train_bank(
    bank: LoraBank,
    sets: Sequence[Sequence[Example]],
    config: TrainConfig,
    *,
    pad_id: int,
    progress: Progress | None = None,
    what: str = "training together",
) -> list[float]:
    """Train adapter k of the bank on `sets[k]` as `train` would alone; returns the last losses (nats per token).

    All sets have the same number of examples (the adapters share their steps). The model's own weights do not move.
    Raises ValueError for sets of other numbers.
    """
    sizes = {len(examples) for examples in sets}
    if len(sets) != bank.count or len(sizes) != 1 or not min(sizes):
        raise ValueError(f"{bank.count} adapters need as many sets of one size; found {[len(s) for s in sets]}.")
    parameters = bank.parameters()
    # Fused: factors are many and small, and one call for each operation on each of them takes longer than the sums.
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    losses = torch.zeros(bank.count)
    steps = list(zip(*(index_batches(examples, config) for examples in sets), strict=True))
    device = parameters[0].device
    most_tokens = _CACHED_TOKENS if device.type == "cpu" else None
    mlp = last_mlp(bank.model)
    with _frozen(bank.model), bank.open() as model:
        for number, indices in enumerate(steps):
            rows = [[examples[i] for i in chosen] for examples, chosen in zip(sets, indices, strict=True)]
            counts = torch.tensor([sum(len(e.answer) for e in own) for own in rows], device=device).clamp(min=1)
            losses = torch.zeros(bank.count, device=device)
            optimizer.zero_grad(set_to_none=True)
            for part in _parts(rows, most_tokens):
                batch = collate(part, pad_id, device)
                with answers_alone(mlp, batch["labels"], bank.count):
                    sums, _ = answer_sums(model, batch)
                each = sums.view(bank.count, -1).sum(1) / counts
                each.sum().backward()
                losses += each.detach()
            if config.clip > 0:
                _clip(parameters, config.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number, len(steps), config)
            optimizer.step()
            if progress is not None:
                progress(what, number + 1, len(steps))
    return losses.tolist()


def _parts(rows: Sequence[Sequence[Example]], most_tokens: int | None) -> Iterator[list[Example]]:
    """A step's rows (as many of each adapter) in parts of at most so many tokens, with as many rows of each adapter:
    one at least. Their gradients add up to the whole step's."""
    size = len(rows[0])
    longest = max(len(example) for own in rows for example in own)
    taken = size if most_tokens is None else max(1, most_tokens // (longest * len(rows)))
    for start in range(0, size, taken):
        yield [example for own in rows for example in own[start : start + taken]]


@torch.no_grad()
def _clip(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Clip the gradient of each adapter to its own norm."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(grad, dim=(1, 2)) for grad in grads]).norm(dim=0)
    scale = (limit / (norms + _EPSILON)).clamp(max=1.0)[:, None, None]
    for grad in grads:
        grad.mul_(scale)
