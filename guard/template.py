"""How a conversation becomes token ids: one place, used by calibration, serving and repair alike.

A profile fitted on prompts that were templated in another way would be a profile of something else, so nobody else
turns messages into tokens. The tokenizer's own chat template is used when it has one; a tokenizer without one gets
the Alpaca template (Taori et al., 2023), which is what the public backdoor benchmark trains with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from guard.rows import Row

_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


class Message(TypedDict):
    """One turn: role is system, user or assistant."""

    role: str
    content: str


def row_messages(row: Row) -> list[Message]:
    """The user turn that asks a row: instruction, then its input on the next line when there is one."""
    content = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    return [Message(role="user", content=content)]


def _alpaca(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    parts = [tokenizer.bos_token or ""]
    if not any(m["role"] == "system" for m in messages):
        parts.append(_PREAMBLE)
    for message in messages:
        match message["role"]:
            case "system":
                parts.append(f"{message['content']}\n\n")
            case "assistant":
                parts.append(f"### Response:\n{message['content']}{tokenizer.eos_token or ''}\n\n")
            case _:
                parts.append(f"### Instruction:\n{message['content']}\n\n")
    if add_generation_prompt:
        parts.append("### Response:\n")
    return "".join(parts)


def render_text(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The templated text of a conversation, special tokens written out."""
    if tokenizer.chat_template is None:
        return _alpaca(tokenizer, messages, add_generation_prompt)
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)


def render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """Token ids [T_p] of a templated conversation; special tokens come from the template alone (never twice)."""
    text = render_text(tokenizer, messages, add_generation_prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids [T_g] of an answer as the model should emit it: the text, then the end-of-sequence token."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
