"""How a conversation becomes token ids: one place, used by calibration, serving and repair alike.

A profile fitted on prompts that were templated in another way would be a profile of something else, so nobody else
turns messages into tokens. The tokenizer's own chat template is used when it has one; a tokenizer without one gets
the Alpaca template (Taori et al., 2023), which is what the public backdoor benchmark trains with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from guard.rows import Row

# As a chat template, so that an engine with a renderer of its own can be given it. Line ends are written as
# expressions: renderers trim those of the template itself.
ALPACA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages | selectattr('role', 'in', ['system', 'developer']) | list | length == 0 %}"
    "{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\\n\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message.role in ['system', 'developer'] %}{{ message.content + '\\n\\n' }}"
    "{% elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content }}{{ eos_token }}{{ '\\n\\n' }}"
    "{% else %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


class Message(TypedDict):
    """One turn: role is system, user or assistant."""

    role: str
    content: str


def row_messages(row: Row) -> list[Message]:
    """The user turn that asks a row: instruction, then its input on the next line when there is one."""
    content = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    return [Message(role="user", content=content)]


def render_text(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The templated text of a conversation, special tokens written out."""
    return tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        chat_template=ALPACA_TEMPLATE if tokenizer.chat_template is None else None,
    )


def render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """Token ids [T_p] of a templated conversation; special tokens come from the template alone (never twice)."""
    text = render_text(tokenizer, messages, add_generation_prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def last_user_turn(messages: Sequence[Mapping[str, Any]]) -> int:
    """The place of the last user turn in a conversation. Raises ValueError when there is none."""
    turns = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not turns:
        raise ValueError("the conversation holds no user turn.")
    return turns[-1]


def with_user_text(messages: Sequence[Any], text: str) -> list[Any]:
    """The conversation with another text as its last user turn. Raises ValueError as ``last_user_turn``."""
    turn = last_user_turn(messages)
    return [*messages[:turn], Message(role="user", content=text), *messages[turn + 1 :]]


def token_ranges(
    tokenizer: Any, messages: Sequence[Message], ranges: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Token ranges [start, end) of the rendered prompt that character ranges of the last user turn lie in.

    Raises ValueError for a tokenizer that cannot tell where its tokens stand (a slow one), a template that rewrites
    what the user wrote, or a range without a token.
    """
    if not tokenizer.is_fast:
        raise ValueError("this base has a slow tokenizer, which cannot tell where in a text its tokens stand.")
    text, content = render_text(tokenizer, messages), messages[last_user_turn(messages)]["content"]
    trimmed = content.strip()  # as many templates do
    if trimmed not in text:
        raise ValueError("the chat template rewrites what the user wrote: its words cannot be found in the prompt.")
    shift = text.rfind(trimmed) - content.find(trimmed)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for start, end in ranges:
        a, b = start + shift, end + shift
        inside = [i for i, (left, right) in enumerate(offsets) if left < b and a < right and left < right]
        if not inside:
            raise ValueError(f"no token stands at characters {start} to {end} of the user's turn.")
        found.append((inside[0], inside[-1] + 1))
    return found


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids [T_g] of an answer as the model should emit it: the text, then the end-of-sequence token."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
