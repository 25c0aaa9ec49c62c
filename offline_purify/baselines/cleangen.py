"""CleanGen: the weights are left as they are, and a trusted model watches over every token that is decoded.

Li et al. 2024. The suspect drafts k tokens greedily; the reference (the base, or what was given as one) reads them in
one forward; at the first token whose probability under the suspect is at least alpha times the reference's, the draft
is cut and the reference's own choice put there (reference/backdoor-methods.md §11.4; a last short draft is read too).
It purifies no weights and costs a second model at every token: here for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from guard.errors import NoReference

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect
    from offline_purify.train import Progress

ALPHA = 20.0
DRAFT = 4
_FLOOR = 1e-6


@torch.no_grad()
def cleangen_answers(
    suspect: Suspect, prompts: Sequence[Sequence[int]], max_new_tokens: int, progress: Progress | None = None
) -> tuple[list[str], float]:
    """Answers (text) to prompts of token ids, and the share of tokens that the reference put in.

    Raises NoReference for a whole model that came without a trusted one.
    """
    if not suspect.has_reference:
        raise NoReference("CleanGen lets a trusted model watch every token: name a reference folder.")
    texts, replaced, tokens = [], 0, 0
    for number, prompt in enumerate(prompts):
        answer, cut = _answer(suspect, list(prompt), max_new_tokens)
        replaced, tokens = replaced + cut, tokens + len(answer)
        texts.append(suspect.tokenizer.decode(answer, skip_special_tokens=True).strip())
        if progress is not None:
            progress("CleanGen", number + 1, len(prompts))
    return texts, replaced / max(tokens, 1)


def _answer(suspect: Suspect, prompt: list[int], limit: int) -> tuple[list[int], int]:
    end = suspect.tokenizer.eos_token_id
    answer: list[int] = []
    replaced = 0
    while len(answer) < limit:
        draft, chances = _draft(suspect, prompt + answer, min(DRAFT, limit - len(answer)), end)
        with suspect.reference():
            logits = _logits(suspect, prompt + answer + draft)
        trusted = logits[len(prompt) + len(answer) - 1 : -1].softmax(-1)
        for place, (token, chance) in enumerate(zip(draft, chances, strict=True)):
            if chance / max(float(trusted[place, token]), _FLOOR) >= ALPHA:
                draft = [*draft[:place], int(trusted[place].argmax())]
                replaced += 1
                break
        answer += draft
        if end in draft:
            return answer[: answer.index(end)], replaced
    return answer, replaced


def _draft(suspect: Suspect, tokens: list[int], count: int, end: int) -> tuple[list[int], list[float]]:
    draft: list[int] = []
    chances: list[float] = []
    while len(draft) < count and (not draft or draft[-1] != end):
        row = _logits(suspect, tokens + draft)[-1].softmax(-1)
        draft.append(int(row.argmax()))
        chances.append(float(row.max()))
    return draft, chances


def _logits(suspect: Suspect, tokens: list[int]) -> torch.Tensor:
    out = suspect.model(input_ids=torch.tensor([tokens], device=suspect.device), use_cache=False)
    logits: torch.Tensor = out.logits[0].float()
    return logits
