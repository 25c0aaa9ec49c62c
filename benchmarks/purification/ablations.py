"""Ablations by name: what a method owes to each of its parts, and how much it hangs on its settings.

Each is a table of methods that the benchmark runs and measures as it does any others: same adapter, rows and budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from benchmarks.purification.errors import BenchmarkError
from benchmarks.purification.methods import METHODS, Attempt, Method, Outcome, silenced, staged
from offline_purify.architectures import CHANNELS
from offline_purify.countertraining import CounterConfig, counter_train
from offline_purify.heads.align import AlignConfig, align
from offline_purify.heads.finetune import finetune_heads
from offline_purify.heads.layout import random_partition_like
from offline_purify.heads.partition import TAU, Partition, Rule, partition
from offline_purify.heads.scores import ALPHA, score_heads
from offline_purify.heads.stage import HeadsConfig, flagged_examples
from offline_purify.signature.find import find_signature
from offline_purify.signature.stage import silence
from offline_purify.signature.suppress import channel_slices
from offline_purify.suspect import AdapterSuspect, Suspect
from offline_purify.train import encode_rows


@dataclass(frozen=True)
class Heads:
    """One plain run of the head method: scored, parted, aligned for some steps, fine-tuned; nothing is judged on the
    way and nothing put back."""

    alpha: float = ALPHA
    rule: Rule = "contrast"
    tau: float = TAU
    lowest: float = 0.25
    lr: float = 5e-3
    steps: int = 40
    aligns: bool = True
    finetunes: bool = True
    random: bool = False

    def __call__(self, suspect: Suspect, attempt: Attempt) -> Outcome:
        """Repair in place; says which heads were taken."""
        material, config = attempt.material, HeadsConfig()
        flags = material.true_flags[: config.most_flags]
        if not flags:
            raise BenchmarkError("no flagged answer differs from the base's: the head method has nothing to align on.")
        flagged = flagged_examples(suspect, flags)
        clean = encode_rows(suspect.tokenizer, attempt.budget.clean(material))
        scores, usual = (score_heads(suspect, rows, self.alpha) for rows in (flagged, clean[: len(flagged)]))
        parts = partition(scores.safety, rule=self.rule, clean_scores=usual.safety, tau=self.tau, lowest=self.lowest)
        if self.random:
            drawn = random_partition_like(parts.suspicious, parts.safe, material.seed + 1)
            parts = Partition(*drawn, "random", False)
        if self.aligns:
            steps = AlignConfig(lr=self.lr, checkpoints=(self.steps,), seed=material.seed)
            for _ in align(suspect, flagged, parts, steps, material.progress):
                pass
        if self.finetunes:
            finetune_heads(
                suspect, clean, parts, config.rates,
                epochs=config.finetune_epochs, seed=material.seed, progress=material.progress,
            )  # fmt: skip
        return Outcome({"partition": parts.to_dict()})


def _adapter(suspect: Suspect) -> AdapterSuspect:
    if not isinstance(suspect, AdapterSuspect):
        raise BenchmarkError("this ablation is of adapters: a whole model holds no updates that could be told apart.")
    return suspect


def _dropped(chosen: Callable[[bool, int], bool]) -> Method:
    """What the adapter changes in some of its projections is taken away, ``chosen`` by (MLP or attention, layer);
    nothing is recovered."""

    def method(suspect: Suspect, _: Attempt) -> Outcome:
        family, model = _adapter(suspect).layout.family, suspect.model
        mlps = {name for part in CHANNELS for name, _, _ in family.projections(model, part)}
        gone = tuple(f"{name}." for name, layer, _ in family.projections(model) if chosen(name in mlps, layer))
        with torch.no_grad():
            for name, parameter in suspect.parameters().items():
                if name.startswith(gone):
                    parameter.zero_()
        return Outcome({"projections": len(gone)})

    return method


def _shuffled(suspect: Suspect, attempt: Attempt) -> Outcome:
    """Every channel gets the changes of another one of its layer: as much is changed, in the wrong places."""
    parameters = _adapter(suspect).parameters()
    generator = torch.Generator().manual_seed(attempt.material.seed)
    orders: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for name, stakes in channel_slices(parameters, suspect.layout.family).items():
            for stake in stakes:
                if stake.layer not in orders:
                    orders[stake.layer] = torch.randperm(stake.length, generator=generator)
                share = stake.of(parameters[name])
                share.copy_(share.index_select(stake.dimension, orders[stake.layer].to(share.device)))
    return Outcome({"layers": len(orders)})


def _sanity(_: tuple[Path, ...]) -> Mapping[str, Method]:
    return {
        "no attention updates": _dropped(lambda mlp, _: not mlp),
        "no MLP updates": _dropped(lambda mlp, _: mlp),
        "no MLP updates in even blocks": _dropped(lambda mlp, layer: mlp and layer % 2 == 0),
        "no MLP updates in odd blocks": _dropped(lambda mlp, layer: mlp and layer % 2 == 1),
        "no updates in even blocks": _dropped(lambda _, layer: layer % 2 == 0),
        "no updates in odd blocks": _dropped(lambda _, layer: layer % 2 == 1),
        "MLP channels shuffled": _shuffled,
    }


def _score(_: tuple[Path, ...]) -> Mapping[str, Method]:
    return {
        "both terms": silenced("signature"),
        "magnitude alone": silenced("magnitude"),
        "alignment alone": silenced("alignment"),
        "both, lengths by layer, weight 0.5": silenced("signature", by_layer=True, weight=0.5),
        "both, share of every layer": silenced("signature", scope="per_layer"),
        "random channels": silenced("random"),
        "recovery alone": silenced("none"),
    }


def _variants(_: tuple[Path, ...]) -> Mapping[str, Method]:
    def of(count: int) -> Method:
        def method(suspect: Suspect, attempt: Attempt) -> Outcome:
            found = attempt.signature(suspect)
            if (learnt := len(found.told["variants"])) < count:
                raise BenchmarkError(f"only {learnt} variants learnt their trigger.")
            told = silence(suspect, attempt.material, attempt.config, found.of_first(count), attempt.budget.ratio)
            return Outcome(told, searched=True)

        return method

    return {f"{count} variants": of(count) for count in (1, 2, 3, 4, 6)}


def _ratio(_: tuple[Path, ...]) -> Mapping[str, Method]:
    shares = (0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.9)
    return {f"{name} {share:.0%}": silenced(name, share) for share in shares for name in ("signature", "random")}


def _heads_by_ratio(_: tuple[Path, ...]) -> Mapping[str, Method]:
    return {
        f"channels {share:.0%}, heads {heads:.0%}": silenced("signature", share, heads=heads)
        for share in (0.2, 0.35, 0.5)
        for heads in (0.0, 0.1, 0.25, 0.5)
    }


def _transfer(donors: tuple[Path, ...]) -> Mapping[str, Method]:
    if not donors:
        raise BenchmarkError("transfer needs the adapters whose signatures are to be tried: --donor FOLDER, repeated.")

    def of(donor: Path) -> Method:
        def method(suspect: Suspect, attempt: Attempt) -> Outcome:
            other = Suspect.open(_adapter(suspect).base_dir, donor, device=str(suspect.device))
            found = find_signature(other, attempt.material, attempt.config.search)
            told = silence(suspect, attempt.material, attempt.config, found, attempt.budget.ratio)
            return Outcome({**found.told, **told})  # it searched for itself: the seconds hold that already

        return method

    own = {"its own": silenced("signature"), "random channels": silenced("random")}
    return own | {f"of {donor.name}": of(donor) for donor in donors}


def _steps(_: tuple[Path, ...]) -> Mapping[str, Method]:
    return {
        "aligned and fine-tuned": Heads(),
        "aligned alone": Heads(finetunes=False),
        "fine-tuned alone": Heads(aligns=False),
        "random heads": Heads(random=True),
    }


def _alpha(_: tuple[Path, ...]) -> Mapping[str, Method]:
    return {f"alpha {alpha:g}": Heads(alpha=alpha) for alpha in (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0)}


def _tau(_: tuple[Path, ...]) -> Mapping[str, Method]:
    return {f"tau {tau:g}": Heads(rule="tau", tau=tau) for tau in (0.1, 0.2, 0.3, 0.4, 0.5)}


def _rate(_: tuple[Path, ...]) -> Mapping[str, Method]:
    return {
        f"rate {lr:g}, {steps} steps": Heads(lr=lr, steps=steps)
        for lr in (1e-3, 2e-3, 5e-3, 1e-2)
        for steps in (20, 80)
    }


def _counter(_: tuple[Path, ...]) -> Mapping[str, Method]:
    def of(rows: int, steps: int, lr: float) -> Method:
        return staged(partial(counter_train, config=CounterConfig(clean_rows=rows, steps=steps, lr=lr)))

    return {
        f"{rows} clean rows, {steps} steps at {lr:g}": of(rows, steps, lr)
        for rows in (400, 1000)
        for steps, lr in ((65, 7e-4), (130, 3e-4), (130, 7e-4), (130, 1e-3))
    }


ABLATIONS: Mapping[str, Callable[[tuple[Path, ...]], Mapping[str, Method]]] = MappingProxyType(
    {
        "sanity": _sanity,
        "score": _score,
        "variants": _variants,
        "ratio": _ratio,
        "heads-by-ratio": _heads_by_ratio,
        "transfer": _transfer,
        "steps": _steps,
        "alpha": _alpha,
        "tau": _tau,
        "rate": _rate,
        "counter": _counter,
    }
)
"""Name of an ablation to the methods that it compares, given the donors."""


def methods_of(name: str, donors: tuple[Path, ...] = ()) -> Mapping[str, Method]:
    """The methods that an ablation compares, the untouched adapter first. Raises BenchmarkError for an unknown name or
    missing donors."""
    if name not in ABLATIONS:
        raise BenchmarkError(f"there is no ablation {name!r}: choose among {', '.join(ABLATIONS)}.")
    return {"none": METHODS["none"]} | dict(ABLATIONS[name](donors))
