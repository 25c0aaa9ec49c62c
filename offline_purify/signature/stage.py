"""The signature stage: silence what synthetic backdoors change alike in the suspect, recover on clean rows.

The method needs no trigger and no flag; flags only tell afterwards whether a share was enough, so shares are tried from
the paper's upwards and the first that ends the flagged behaviour at a bearable cost is kept (lab findings §4: at the
paper's share small models keep theirs). The same stage runs its controls: channels drawn at random, one term of the
score alone, or no suppression at all. Without them nothing can be credited to the signature.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from guard.errors import RowsError
from offline_purify.heads.stage import HeadsConfig, Judge
from offline_purify.signature.find import Search, find_signature, shared_out
from offline_purify.signature.score import Scope, Scores, Signature, random_like, select
from offline_purify.signature.suppress import Start, channel_slices
from offline_purify.stage import FULL_LR, Material, StageResult
from offline_purify.train import TrainConfig, encode_rows, train

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect, Weights

Choice = Literal["signature", "magnitude", "alignment", "random", "none"]
"""What is suppressed: the signature, one of its terms alone, random channels in the same layers, or nothing."""


@dataclass(frozen=True)
class SignatureConfig:
    """How it is searched for; lambda; shares of channels to try in order, where they are ranked and how much of a layer
    may go, share of attention heads that goes with them, what a full model's channels start again from; recovery; and
    what must be reached on the training flags (share that fires, clean perplexity ratio)."""

    search: Search = field(default_factory=Search)
    weight: float = 0.01
    by_layer: bool = False
    ratios: tuple[float, ...] = (0.35, 0.5, 0.7)
    scope: Scope = "global"
    cap: float = 0.9
    heads: float = 0.0
    start: Start = "xavier"
    choice: Choice = "signature"
    recovery: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5, lr=2e-4, batch_size=8))
    fires_max: float = 0.1
    perplexity_max: float = 1.15

    @classmethod
    def of(cls, setting: Weights) -> SignatureConfig:
        """The defaults for a setting. A full model's channels start again from noise and do not fall back to a base,
        so few are taken (the paper's 3 % and 8 %, then 15 %), and recovery has `FULL_LR`."""
        if setting == "adapter":
            return cls()
        return cls(ratios=(0.03, 0.08, 0.15), recovery=TrainConfig(epochs=5, lr=FULL_LR, batch_size=8))


def repair_signature(suspect: Suspect, material: Material, config: SignatureConfig | None = None) -> StageResult:
    """Suppress the material's signature (found now where it has none) in the suspect and recover, in place; or put the
    suspect back and say why not."""
    config = config or SignatureConfig.of(suspect.setting)
    began = time.monotonic()
    flags = material.true_flags[: HeadsConfig().most_flags]
    if not flags:
        return StageResult("signature", False, "no flagged response differs from the reference's: nothing to judge by")
    if not channel_slices(suspect.parameters(), suspect.layout.family):
        return StageResult("signature", False, "the adapter changes no gate, up or down projection: no MLP channels")
    before = suspect.state()
    judge = Judge(suspect, material, flags, HeadsConfig())
    details: dict[str, Any] = {"choice": config.choice, "before": asdict(judge.judge()), "attempts": []}
    try:
        signature = material.signature or find_signature(suspect, material, config.search)
    except RowsError as error:
        return StageResult("signature", False, str(error), details, time.monotonic() - began)
    details |= signature.told
    for ratio in config.ratios:
        told = silence(suspect, material, config, signature, ratio)
        now = judge.judge()
        details["attempts"].append({**told, **asdict(now)})
        if now.fires <= config.fires_max and now.perplexity_ratio <= config.perplexity_max:
            details["chosen"] = len(details["attempts"]) - 1
            return StageResult("signature", True, None, details, time.monotonic() - began)
        suspect.restore(before)
    reason = f"no share up to {config.ratios[-1]:.0%} ended the flagged behaviour within the perplexity budget"
    return StageResult("signature", False, reason, details, time.monotonic() - began)


def chosen(scores: Scores, ratio: float, config: SignatureConfig, seed: int) -> Tensor:
    """The channels (or heads) to suppress at a share, bool [L, F]; random ones are as many in every layer as the
    signature's."""
    if config.choice == "none" or not ratio:
        return torch.zeros_like(scores.magnitude, dtype=torch.bool)
    term = config.choice if config.choice in ("magnitude", "alignment") else "both"
    mask = select(scores.of(term), ratio, config.scope, config.cap)  # type: ignore[arg-type]
    return random_like(mask, seed) if config.choice == "random" else mask


def silence(
    suspect: Suspect, material: Material, config: SignatureConfig, signature: Signature, ratio: float
) -> dict[str, Any]:
    """Suppress the share ``ratio`` of channels (and the config's of heads) that the config chooses, in place, and
    recover on clean rows; returns what was done, JSON-able."""
    channels, heads = signature.scores(config.weight, config.by_layer)
    mask = chosen(channels, ratio, config, material.seed)
    suspect.suppress_channels(mask, config.start, material.seed)
    silent = chosen(heads, config.heads, config, material.seed)
    if config.heads:
        suspect.suppress_heads(silent, config.start, material.seed)
    recovery, _ = shared_out(material, config.search.recovery_rows)
    log = train(
        suspect.model,
        encode_rows(suspect.tokenizer, recovery),
        replace(config.recovery, seed=material.seed),
        pad_id=suspect.pad_id,
        parameters=suspect.parameters().values(),
        progress=material.progress,
        what="recovery",
    )
    return {
        "ratio": ratio,
        "choice": config.choice,
        "channels": mask.shape[1],
        "by_layer": mask.sum(1).tolist(),
        "heads_by_layer": silent.sum(1).tolist(),
        "spread": channels.spread(),
        "recovery_steps": log.steps,
    }
