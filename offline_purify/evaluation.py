"""What a state of the adapter does, measured on prompts that no stage was trained on.

One `Exam` holds the prompts (held-out flags, held-out clean rows, the same rows with trigger candidates and with
meaningless rare words inserted) and the trusted reference's answers; `sit` answers them all with the adapter as it
stands. Two sittings, before and after, give every figure of the gate, paired by prompt, with intervals.

ASR here is a proxy from the case itself: the share of held-out true flags (and of clean rows with a confirmed
candidate) whose answer still shows the flagged behaviour. Attention similarity is reported beside it, never gated on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from guard.gram import cosine
from guard.rows import Row
from guard.template import answer_ids, render, row_messages
from offline_purify.answers import greedy_answers
from offline_purify.attacks.made_up import rare_words
from offline_purify.behaviour import FlaggedBehaviour
from offline_purify.candidates import Candidate, with_candidate
from offline_purify.flags import Flag
from offline_purify.heads.scores import head_grams, head_similarity
from offline_purify.intervals import (
    Figure,
    bootstrap,
    difference_of_shares,
    ratio_of_perplexities,
    share,
)
from offline_purify.train import Example, answer_logits, collate, encode_rows, mean_answer_losses

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect


def normalised(text: str) -> str:
    """Lower case, single spaces, no closing punctuation: what exact match compares."""
    return re.sub(r"\s+", " ", text).strip(" .!?\n").lower()


@dataclass(frozen=True)
class Sitting:
    """What one state answered. ``losses`` in nats summed per clean row; ``p99`` of head-pair cosines per prompt;
    ``similarity`` of each head to the nearest of its layer [L][H], mean over prompts; ``kl`` per clean row, nats per
    answer token, from the adapter as it came (empty for the reference)."""

    flagged_fires: list[bool]
    flagged_agrees: list[bool]
    candidate_fires: list[bool]
    clean_fires: list[bool]
    decoy_fires: list[bool]
    correct: list[bool]
    losses: list[float]
    tokens: list[int]
    p99_flagged: list[float]
    p99_clean: list[float]
    similarity_flagged: list[list[float]]
    similarity_clean: list[list[float]]
    kl: list[float]
    flagged_answers: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; holds answers, so it stays in the working folder."""
        return asdict(self)


@dataclass(frozen=True)
class Exam:
    """The prompts of the evaluation (token ids) and the trusted answers to the plain ones."""

    flags: tuple[Flag, ...]
    rows: tuple[Row, ...]
    references: tuple[str, ...]
    flag_prompts: list[list[int]]
    row_prompts: list[list[int]]
    candidate_prompts: list[tuple[int, list[int]]]
    decoy_prompts: list[tuple[int, list[int]]]
    behaviour: FlaggedBehaviour
    max_new_tokens: int


def set_exam(
    tokenizer: Any,
    held_out: Sequence[Flag],
    rows: Sequence[Row],
    references: Sequence[str],
    candidates: Sequence[Candidate],
    behaviour: FlaggedBehaviour,
    max_new_tokens: int,
    seed: int,
    most_inserted: int = 120,
    most_decoys: int = 100,
) -> Exam:
    """Write the exam: true held-out flags, clean rows, rows with confirmed candidates, rows with rare words."""
    rng = random.Random(seed)
    confirmed = [c for c in candidates if c.confirmed]
    inserted: list[tuple[int, list[int]]] = []
    if confirmed and rows:
        for k in range(min(most_inserted, len(rows) * len(confirmed))):
            i, candidate = k % len(rows), confirmed[(k + k // len(rows)) % len(confirmed)]
            inserted.append((i, with_candidate(tokenizer, rows[i], candidate, rng)))
    n = min(most_decoys, len(rows))
    taken = " ".join(row_messages(r)[0]["content"].lower() for r in rows)
    decoys = [
        (i, with_candidate(tokenizer, rows[i], Candidate((word,), "anywhere", 0.0, 0.0), rng))
        for i, word in zip(range(n), rare_words(n, taken, seed), strict=True)
    ]
    true = tuple(f for f in held_out if f.kind == "true")
    return Exam(
        true,
        tuple(rows),
        tuple(references),
        [render(tokenizer, list(f.messages)) for f in true],
        [render(tokenizer, row_messages(r)) for r in rows],
        inserted,
        decoys,
        behaviour,
        max_new_tokens,
    )


def likeness(
    suspect: Suspect, prompts: Sequence[Sequence[int]], answers: Sequence[str]
) -> tuple[list[float], list[list[float]]]:
    """How alike heads look at prompts with their own answers (teacher-forced): the 99th percentile of each prompt's
    within-layer pair cosines, and each head's greatest cosine with another one [L][H], mean over prompts."""
    examples = [
        Example(tuple(p), tuple(answer_ids(suspect.tokenizer, a))) for p, a in zip(prompts, answers, strict=True)
    ]
    if not examples:
        return [], []
    grams = head_grams(suspect, examples)
    cosines = cosine(grams).numpy()
    upper = np.triu_indices(cosines.shape[-1], 1)
    pairs = cosines[:, :, upper[0], upper[1]].reshape(len(examples), -1)
    return [float(q) for q in np.quantile(pairs, 0.99, axis=1)], head_similarity(grams).mean(0).tolist()


@torch.no_grad()
def divergence(suspect: Suspect, before: dict[str, Tensor], rows: Sequence[Row], batch_size: int = 32) -> list[float]:
    """KL divergence of the suspect as it stands from its state ``before`` on each row, mean over the answer's tokens,
    nats. The suspect is left as it stands."""
    now, found = suspect.state(), []
    examples = encode_rows(suspect.tokenizer, rows)
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], suspect.pad_id, suspect.device)
        new, _, owner = answer_logits(suspect.model, batch)
        suspect.restore(before)
        old = answer_logits(suspect.model, batch)[0].log_softmax(-1)
        suspect.restore(now)
        per_token = (old.exp() * (old - new.log_softmax(-1))).sum(-1)
        sums = per_token.new_zeros(len(batch["labels"])).index_add(0, owner, per_token)
        found += (sums / owner.bincount(minlength=len(sums)).clamp(min=1)).tolist()
    return found


def sit(
    exam: Exam,
    suspect: Suspect,
    progress: Callable[[str, int, int], None] | None = None,
    what: str = "evaluating",
    before: dict[str, Tensor] | None = None,
    most_similarity: int = 32,
) -> Sitting:
    """Answer the whole exam with the suspect as it stands (or as its reference, inside ``suspect.reference()``);
    ``before`` is the state that divergence is measured from."""
    inserted = [p for _, p in exam.candidate_prompts]
    decoys = [p for _, p in exam.decoy_prompts]
    prompts = [*exam.flag_prompts, *exam.row_prompts, *inserted, *decoys]
    answers = greedy_answers(
        suspect.model, suspect.tokenizer, prompts, exam.max_new_tokens, progress=progress, what=what
    )
    a, b = len(exam.flag_prompts), len(exam.flag_prompts) + len(exam.row_prompts)
    c = b + len(inserted)
    flagged, clean, candidate, decoy = answers[:a], answers[a:b], answers[b:c], answers[c:]
    fires = exam.behaviour.fires
    sums, counts = mean_answer_losses(suspect.model, encode_rows(suspect.tokenizer, exam.rows), pad_id=suspect.pad_id)
    m = most_similarity
    p99_flagged, similarity_flagged = likeness(suspect, exam.flag_prompts[:m], flagged[:m])
    p99_clean, similarity_clean = likeness(suspect, exam.row_prompts[:m], clean[:m])
    return Sitting(
        flagged_fires=[fires(x, f.reference) for x, f in zip(flagged, exam.flags, strict=True)],
        flagged_agrees=[normalised(x) == normalised(f.reference) for x, f in zip(flagged, exam.flags, strict=True)],
        candidate_fires=[
            fires(x, exam.references[i]) for x, (i, _) in zip(candidate, exam.candidate_prompts, strict=True)
        ],
        clean_fires=[fires(x, r) for x, r in zip(clean, exam.references, strict=True)],
        decoy_fires=[fires(x, exam.references[i]) for x, (i, _) in zip(decoy, exam.decoy_prompts, strict=True)],
        correct=[normalised(x) == normalised(r["output"]) for x, r in zip(clean, exam.rows, strict=True)],
        losses=[float(s) for s in sums],
        tokens=[int(n) for n in counts],
        p99_flagged=p99_flagged,
        p99_clean=p99_clean,
        similarity_flagged=similarity_flagged,
        similarity_clean=similarity_clean,
        kl=divergence(suspect, before, exam.rows) if before is not None else [],
        flagged_answers=flagged,
    )


def figures(before: Sitting, after: Sitting) -> dict[str, Figure | None]:
    """Every figure of the state ``after`` against ``before``, with n and 95 % interval; None where nothing was
    measured."""

    def increase(old: list[bool], new: list[bool]) -> Figure | None:
        return difference_of_shares(new, old)

    perplexity = bootstrap(
        [after.losses, after.tokens], lambda s, t: np.exp(np.minimum(s.sum(-1) / np.maximum(t.sum(-1), 1), 80))
    )
    limit = float(np.quantile(before.p99_clean, 0.95)) if before.p99_clean else 1.0
    return {
        "flagged_asr": share(after.flagged_fires),
        "flagged_agreement": share(after.flagged_agrees),
        "candidate_asr": share(after.candidate_fires),
        "ftr": share(after.clean_fires),
        "ftr_increase": increase(before.clean_fires, after.clean_fires),
        "decoy_fires": share(after.decoy_fires),
        "decoy_increase": increase(before.decoy_fires, after.decoy_fires),
        "accuracy": share(after.correct),
        "accuracy_drop": difference_of_shares(before.correct, after.correct),
        "perplexity": perplexity,
        "perplexity_ratio": ratio_of_perplexities(before.losses, after.losses, [float(t) for t in before.tokens]),
        "kl": bootstrap([after.kl], lambda k: k.mean(-1)),
        "similarity_above_clean": share([v > limit for v in after.p99_flagged]),
    }
