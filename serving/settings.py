"""Everything about the gateway that an operator may set, in one typed object.

The same fields come from a TOML file, from ``HEADGUARD_*`` environment variables and from arguments; arguments win over
the environment, the environment over the file. Unknown keys are refused, so a typo never silently weakens a guard.
``docs/settings.md`` lists every field; a test keeps the two equal. Gate thresholds belong to the clinic, not here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from serving.policy import Policy

ENV_PREFIX = "HEADGUARD_"
# Read by clients of the gateway (the commands) and by engines, not by the gateway; listed so that they are not refused.
CLIENT_VARIABLES = frozenset(
    {"HEADGUARD_URL", "HEADGUARD_KEY", "HEADGUARD_CONFIG", "HEADGUARD_TEST_POSTGRES_URL", "HEADGUARD_WATCH"}
)
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class SettingsError(Exception):
    """Settings that cannot be used; the message names each field, what was given and what was expected."""


class Settings(BaseSettings):
    """The gateway's settings."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)

    model: Path = Field(description="Folder of the base model (Hugging Face format); adapters are checked against it.")
    served_name: str = Field(
        default="base", pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$", description="Public name of the base."
    )
    state_dir: Path = Field(
        default=Path("headguard-state"), description="Folder for all state: database, adapters, keys."
    )
    database_url: SecretStr | None = Field(
        default=None, description="SQLAlchemy URL; default SQLite in state_dir, or postgresql+psycopg://…"
    )
    vaccine: Path | None = Field(
        default=None, description="Vaccine of the base (headguard vaccinate), for the profiles that repairs fit."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    auth: Literal["on", "off"] = Field(
        default="on",
        description="off lets clients call /v1 without a key, on loopback only; /admin always needs a key.",
    )
    engine_url: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="URLs of engines that run already (several take turns); default is one started here.",
    )
    engine_key: SecretStr | None = Field(default=None, description="API key that these engines ask for.")
    policy: Policy = Field(default=Policy(), description="Policy of every model name that has none of its own.")
    client_verdict: Literal["full", "status"] = Field(
        default="full", description="How much of the verdict clients see: everything but span text, or the status only."
    )
    evidence: Literal["none", "sealed", "raw"] = Field(
        default="sealed",
        description="Storage of flagged prompts and answers: not at all, encrypted, or readable by operators.",
    )
    evidence_ttl_days: float = Field(default=30.0, gt=0, description="Days until stored evidence is erased.")
    max_flags_per_case: int = Field(
        default=500, ge=1, description="Flagged requests kept per case; more are only counted."
    )
    max_flags_per_minute: int = Field(default=120, ge=1, description="Flagged requests kept per minute over all cases.")
    max_open_cases: int = Field(default=100, ge=1, description="Open cases; more flagged revisions are only counted.")
    max_evidence_bytes: int = Field(default=256 * 2**20, ge=0, description="Bytes of evidence kept over all cases.")
    max_running_repairs: int = Field(default=4, ge=1, description="Repairs requested or running at once.")
    request_timeout_s: float = Field(default=300.0, gt=0, description="Longest wait for the next event of an engine.")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="Largest body of an ordinary request.")
    max_upload_bytes: int = Field(
        default=2 * 2**30, ge=1024, description="Largest body of an adapter or profile upload."
    )
    max_concurrent_requests: int = Field(default=256, ge=1, description="Requests answered at once; more get a 429.")
    drain_timeout_s: float = Field(
        default=60.0, ge=0, description="How long a swap waits for requests of the old revision."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least severe line logged."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment. ``load_settings`` adds the file below them."""
        return (init_settings, EnvSettingsSource(settings_cls))

    @field_validator("engine_url", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        return tuple(filter(None, given.replace(",", " ").split())) if isinstance(given, str) else given

    @field_validator("model", "state_dir", "vaccine")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path.expanduser().absolute() if path is not None else None

    @model_validator(mode="after")
    def _sound(self) -> Settings:
        if self.auth == "off" and self.host not in _LOOPBACK:
            raise ValueError(
                f"auth = 'off' is for loopback only, but host is {self.host!r}: use 127.0.0.1 or auth 'on'"
            )
        return self

    @property
    def database(self) -> str:
        """The database URL in force (it may hold a password: do not print)."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.state_dir / 'headguard.sqlite'}"


def _unknown_variables() -> list[str]:
    known = {f"{ENV_PREFIX}{name}".upper() for name in Settings.model_fields}
    present = {name for name in os.environ if name.upper().startswith(ENV_PREFIX)}
    return sorted(n for n in present if n.upper().split("__")[0] not in known and n not in CLIENT_VARIABLES)


def load_settings(file: Path | None = None, **arguments: Any) -> Settings:
    """Settings from ``arguments``, then ``HEADGUARD_*``, then the TOML ``file``.

    Raises SettingsError naming every wrong field. Arguments that are None are as if not given.
    """
    if unknown := _unknown_variables():
        raise SettingsError(f"unknown environment variables: {', '.join(unknown)}. See docs/settings.md for the names.")
    if file is not None and not file.is_file():
        raise SettingsError(f"settings file {file} does not exist.")
    given = {name: value for name, value in arguments.items() if value is not None}

    class FromFile(Settings):
        """The same settings with the file as their last source."""

        @classmethod
        def settings_customise_sources(cls, *args: Any, **sources: Any) -> tuple[PydanticBaseSettingsSource, ...]:
            above = super().settings_customise_sources(*args, **sources)
            return (*above, TomlConfigSettingsSource(cls, toml_file=file))

    try:
        return FromFile(**given) if file else Settings(**given)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors(include_input=False)]
        raise SettingsError("settings cannot be used: " + "; ".join(lines)) from None
    except ValueError as error:
        raise SettingsError(f"settings file {file} is not valid TOML: {error}") from None
