"""Every error the gateway answers with, in the one shape clients already know: OpenAI's ``{"error": {...}}``.

An error carries the HTTP status it becomes. What the guard refuses (an adapter, a profile, an alpha) is translated
here once, so that no route does it by hand and no bad input becomes a stack trace.
"""

from __future__ import annotations

from typing import Any

from guard.errors import AdapterRejected, AlphaTooFine, GuardError, ProfileMismatch


class ServingError(Exception):
    """An error with an HTTP status and an OpenAI-shaped body. ``code`` is stable and meant for programs."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The JSON body that a client sees."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(ServingError):
    """The request itself is wrong; sending it again will not help."""


class Unauthenticated(ServingError):
    """No key, or one that is not known (or no longer)."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(ServingError):
    """A known key whose role may not do this."""

    status, type, code = 403, "permission_error", "forbidden"


class NotFound(ServingError):
    """Nothing by that name."""

    status, code = 404, "not_found"


class Conflict(ServingError):
    """The request is fine but the state of things forbids it now."""

    status, code = 409, "conflict"


class TooLarge(ServingError):
    """A body over the configured limit."""

    status, code = 413, "body_too_large"


class Unavailable(ServingError):
    """The engine, or the revision asked for, cannot answer now."""

    status, type, code = 503, "server_error", "engine_unavailable"


def from_guard(error: GuardError) -> ServingError:
    """The HTTP form of one of the guard's own errors, message unchanged."""
    if isinstance(error, AlphaTooFine):
        return BadRequest(str(error), code="alpha_too_fine", param="alpha")
    if isinstance(error, ProfileMismatch):
        return Conflict(str(error), code="profile_mismatch")
    if isinstance(error, AdapterRejected):
        return BadRequest(str(error), code="adapter_rejected")
    return BadRequest(str(error))
