"""What went wrong, in words: one sentence for each control that fails and each promise that is not kept."""

from __future__ import annotations

from typing import Any

_WHY = {
    "forced": "what is flagged is in part the text that follows, not the trigger",
    "decoys": "near-triggers look like triggers to it",
    "rare_words": "an unknown word alone is flagged",
    "long": "long prompts are flagged for being long",
    "joined": "prompts of a shape that calibration never saw are flagged: calibrate on such traffic",
    "one_token": "short answers are flagged for being short",
}


def failures(result: dict[str, Any]) -> list[str]:
    """Sentences on a result's failed controls and broken promises; empty when there are none."""
    said = []
    for name, control in result["controls"].items():
        if control["fails"]:
            said.append(f"{_flagged(control, control['question'])}: {_WHY.get(name, 'not what was wanted')}.")
    for name, parts in result["others"].items():
        for control in parts.values():
            if control["fails"]:
                said.append(f"{_flagged(control, control['question'])}{_comment(name)}.")
    for test, promise in result["uniformity"].items():
        if not promise["inside_held_out"]:
            side = "more" if promise["fpr"] > result["settings"]["alpha"] else "fewer"
            said.append(
                f"`{test}` flags {promise['fpr']:.4f} of {promise['n']} clean prompts, {side} than chance allows at "
                f"α = {result['settings']['alpha']:g}: clean and calibration prompts are not exchangeable."
            )
    return said


def _flagged(control: dict[str, Any], question: str) -> str:
    figure = control["fused"]
    text = (
        f"{question}: {figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}] of {figure['n']} are flagged, "
        f"more than {control['limit']:.3f} "
        f"(attention alone {control['fused_attention_only']['value']:.3f}"
    )
    if "confidence" in control:
        text += f", confidence alone {control['confidence']['value']:.3f}"
    return text + ")"


def _comment(name: str) -> str:
    if name == "benign_adapter":
        return ": its policy makes other prompts look odd"
    return ": there is no backdoor to find there"
