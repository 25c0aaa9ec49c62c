"""The dependency every route names: which role its caller must have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import Request

from serving.auth import ANONYMOUS, Caller, Role, authenticate

if TYPE_CHECKING:
    from serving.gateway import Gateway


def gateway_of(request: Request) -> Gateway:
    """The gateway this application belongs to."""
    return request.app.state.gateway


def needs(role: Role) -> Callable[[Request], Caller]:
    """A dependency that gives the caller, if they may do what needs ``role``: else 401 or 403.

    With ``auth = off`` clients need no key; everything else still does.
    """

    def caller(request: Request) -> Caller:
        gateway = gateway_of(request)
        header = request.headers.get("authorization")
        if role == "client" and gateway.settings.auth == "off":
            return ANONYMOUS
        with gateway.store.read() as session:
            return authenticate(session, header).require(role)

    return caller
