"""The command line and the environment with which `vllm serve` is started, guarded. What the user gives wins, except
where it would open a way around the guard.

On a GPU decode steps must not be replayed as one graph, or the probe, which is code, would not run in them:
`-cc.cudagraph_mode=PIECEWISE` captures everything but attention.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from guard.probes.vllm.plugin import PLUGIN
from guard.template import ALPACA_TEMPLATE
from guard.watch import WATCH_VARIABLE
from serving.errors import ServingError

# Live, new and draining revisions of two names, and a slot that a CPU needs free.
_MAX_LORAS = 8
# PEFT's common ranks; a larger one costs memory in every slot.
_MAX_LORA_RANK = 32
# Set by headguard alone: where the engine listens and how it is named is the gateway's affair.
_OURS = ("--host", "--port", "--uds", "--served-model-name", "--api-key", "--model", "--lora-modules")


class EngineNotStarted(ServingError):
    """vLLM could not be started; the message says why and what to do."""

    status, type, code = 503, "server_error", "engine_not_started"


def installed() -> str:
    """vLLM's version; the CPU build's says so ("+cpu"). Raises EngineNotStarted when there is none."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        raise EngineNotStarted("vLLM is not installed here: `make vllm` installs it.") from None


def command(
    model: Path, served_name: str, port: int, given: Sequence[str], cpu: bool, template: Path | None = None
) -> list[str]:
    """`vllm serve …` for a model folder. given: the user's own arguments; template: of chats, for a tokenizer that has
    none. Raises EngineNotStarted for refused arguments.
    """
    names = {_name(argument) for argument in given if argument.startswith("-")}
    if taken := sorted(names & set(_OURS)):
        raise EngineNotStarted(
            f"{', '.join(taken)} cannot be given to vLLM here: headguard sets {'it' if len(taken) == 1 else 'them'} "
            "(--host, --port and --served-name of headguard serve are the gateway's)."
        )
    defaults = {
        "--max-loras": str(_MAX_LORAS),
        "--max-lora-rank": str(_MAX_LORA_RANK),
        # A cache of adapters beside the slots would only hide that one was evicted.
        "--max-cpu-loras": _value(given, "--max-loras") or str(_MAX_LORAS),
    }
    lora = [] if names & {"--no-enable-lora"} else ["--enable-lora", *_missing(defaults, names)]
    chats = [] if template is None or names & {"--chat-template"} else ["--chat-template", str(template)]
    graphs = (
        [] if cpu or names & {"-cc", "--compilation-config", "--enforce-eager"} else ["-cc.cudagraph_mode=PIECEWISE"]
    )
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model),
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", served_name,
        "--disable-uvicorn-access-log", *chats, *lora, *graphs, *([] if cpu else ["--no-async-scheduling"]),
        *(argument for argument in given if argument != "--no-enable-lora"),
    ]  # fmt: skip


def environment(around: Mapping[str, str], key: str, sockets: Path, cpu: bool) -> dict[str, str]:
    """The child's environment. key: the API key that the engine will ask for; sockets: a folder of its own."""
    plugins = [name for name in around.get("VLLM_PLUGINS", "").split(",") if name and name != PLUGIN]
    ours = {
        "VLLM_PLUGINS": ",".join([PLUGIN, *plugins]),
        "VLLM_API_KEY": key,
        "VLLM_RPC_BASE_PATH": str(sockets),
        # Off, whatever stands around: raw adapter routes and the development server are ways around the guard.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",
        "VLLM_SERVER_DEV_MODE": "0",
        "PYTHONUNBUFFERED": "1",
    }
    # Idle connections are for the gateway to close: a server that closes them loses a request now and then.
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "300"}
    if not cpu:
        defaults["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # guard.probes.vllm.runner_v2 has not run yet
    return {**defaults, **around, **ours}


def chat_template(model: Path, folder: Path) -> Path | None:
    """A file in `folder` with the template that the guard renders chats with, for a tokenizer that has none."""
    try:
        settings = json.loads((model / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        settings = {}
    if settings.get("chat_template") or any((model / f"chat_template.{kind}").is_file() for kind in ("jinja", "json")):
        return None
    file = folder / "chat_template.jinja"
    file.write_text(ALPACA_TEMPLATE)
    return file


def around() -> dict[str, str]:
    """This process's environment without what is meant for the gateway."""
    return {name: value for name, value in os.environ.items() if name == WATCH_VARIABLE or not _gateways(name)}


def _gateways(name: str) -> bool:
    return name.upper().startswith("HEADGUARD_")


def _name(argument: str) -> str:
    """`--max_loras=4` → `--max-loras`; `-cc.mode=3` → `-cc`."""
    return argument.split("=")[0].split(".")[0].replace("_", "-")


def _value(given: Sequence[str], name: str) -> str | None:
    for place, argument in enumerate(given):
        if _name(argument) == name:
            return argument.split("=", 1)[1] if "=" in argument else (*given, "")[place + 1]
    return None


def _missing(defaults: Mapping[str, str], names: set[str]) -> list[str]:
    return [part for name, value in defaults.items() if name not in names for part in (name, value)]
