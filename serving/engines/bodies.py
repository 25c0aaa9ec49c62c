"""Bodies of requests to any engine, from bytes to checked models; and the field by which a gateway says how to guard.

Unknown fields are ignored, as OpenAI-compatible servers do; a wrong one is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError

from guard.errors import GuardError
from guard.watch import Watch
from serving.errors import BadRequest


def _asked(told: Any) -> Watch:
    try:
        return Watch.parse(told if isinstance(told, dict) else "")
    except GuardError as error:
        raise ValueError(str(error)) from error


class Guarded(BaseModel):
    """A body with the internal field `headguard`, set by the gateway alone: the request's watch."""

    model_config = ConfigDict(extra="ignore")

    headguard: Annotated[Watch, PlainValidator(_asked)] = Watch()


class RevisionBody(BaseModel):
    """POST /guard/revisions: folders on the engine's own disk."""

    model_config = ConfigDict(extra="ignore")

    revision: str
    path: Path
    profile: Path | None = None


class ProfileBody(BaseModel):
    """PUT /guard/revisions/{revision}/profile."""

    model_config = ConfigDict(extra="ignore")

    profile: Path | None = None


class ProbeBody(BaseModel):
    """PUT /guard/probe: a drill. A probe that is not attached sees nothing, and every answer is unscored."""

    model_config = ConfigDict(extra="ignore")

    attached: bool


AnyBody = TypeVar("AnyBody", bound=BaseModel)


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises BadRequest."""
    try:
        data = json.loads(raw)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {_where(error)}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise BadRequest(f"the body must be a JSON object, found {type(data).__name__}.", code="invalid_json")
    return data


def check(data: dict[str, Any], kind: type[AnyBody]) -> AnyBody:
    """A request body from its JSON. Raises BadRequest naming the first field that is wrong."""
    try:
        # Text that UTF-8 cannot carry (half a surrogate pair) is found here, not inside the tokenizer.
        json.dumps(data, ensure_ascii=False).encode()
        return kind.model_validate(data)
    except UnicodeEncodeError as error:
        raise BadRequest("the body holds text that is not valid Unicode (a lone surrogate).") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = [str(part) for part in first["loc"]]
        raise BadRequest(f"{'.'.join(place) or 'body'}: {first['msg']}.", param=next(iter(place), None)) from error


def parse(raw: bytes, kind: type[AnyBody]) -> AnyBody:
    """A request body from its bytes. Raises BadRequest."""
    return check(read_object(raw), kind)


def _where(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}."
    return f"{type(error).__name__}."
