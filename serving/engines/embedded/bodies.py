"""Bodies of requests to the engine's OpenAI routes, checked, and turned into what the engine runs.

Unknown fields are ignored, as OpenAI-compatible servers do. Known fields that this engine does not implement are
refused by name unless they hold the value that changes nothing: a client must not believe that a parameter was
honoured.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from guard.template import Message, render
from serving.engines.bodies import AnyBody, Guarded, check, read_object
from serving.engines.embedded.requests import GenerateRequest
from serving.engines.embedded.sampling import Sampling
from serving.errors import BadRequest

# Parameters that exist in the API but not here, each with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
}
_MAX_STOPS = 16

Finite = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    include_usage: bool = False


class Body(Guarded):
    """Fields that both kinds of completion share."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def request(self, prompt: list[int], revision: str | None, max_tokens: int | None) -> GenerateRequest:
        """The engine's request for this body."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > _MAX_STOPS:
            raise BadRequest(f"at most {_MAX_STOPS} stop strings, found {len(stops)}.", param="stop")
        return GenerateRequest(
            prompt=tuple(prompt),
            revision=revision,
            max_tokens=max_tokens,
            sampling=Sampling(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                seed=self.seed,
            ),
            stop=stops,
            watch=self.headguard,
        )


class TextPart(BaseModel):
    """A part of a message's content; other kinds than text are not supported."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def message(self) -> Message:
        """The turn as the chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=content)


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def generate(self, tokenizer: Any, revision: str | None) -> GenerateRequest:
        """The engine's request: the conversation through the chat template."""
        try:
            prompt = render(tokenizer, [message.message() for message in self.messages])
        except Exception as error:  # a chat template is a program: it may refuse the conversation in any way it likes
            raise BadRequest(
                f"the messages do not fit this model's chat template ({type(error).__name__}).", param="messages"
            ) from error
        return self.request(prompt, revision, self.max_completion_tokens or self.max_tokens)


class CompletionBody(Body):
    """POST /v1/completions. One prompt: text, or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]

    def generate(self, tokenizer: Any, revision: str | None) -> GenerateRequest:
        """The engine's request: text is tokenised with the tokenizer's own special tokens, ids are taken as they
        are.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) != 1:
                raise BadRequest(f"one prompt per request, found {len(prompt)}.", param="prompt")
            prompt = prompt[0]
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        return self.request(list(ids), revision, self.max_tokens)


def parse(raw: bytes, kind: type[AnyBody]) -> AnyBody:
    """A request body from its bytes. Raises BadRequest naming the first field that is wrong or not implemented."""
    data = read_object(raw)
    for name, neutral in _NEUTRAL.items():
        value = data.get(name)
        if value is not None and value not in neutral:
            raise BadRequest(f"{name!r} is not supported by this engine.", code="unsupported_parameter", param=name)
    return check(data, kind)
