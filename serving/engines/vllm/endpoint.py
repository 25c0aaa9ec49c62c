"""What vLLM loads into its API server (`vllm.endpoint_plugins`): the `/guard` routes and the middleware.

A guard that is half there is worse than none: when no worker has the probe, or the server was started in a way that
would let requests past it, this raises, and the server does not start.
"""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from guard.errors import UnsupportedModel
from guard.identity import base_digest
from guard.watch import default_watch
from serving.engines.administration import administration, install_refusals
from serving.engines.vllm.engine import VllmEngine
from serving.engines.vllm.middleware import GuardMiddleware

# A swap needs the live revision, the new one, and the previous one that drains or stands by.
MIN_ADAPTERS = 3


class NotGuarded(RuntimeError):
    """vLLM was started in a way in which it would not be guarded; the message says what to change."""


class HeadguardEndpoint:
    """See vLLM's `EndpointPlugin`."""

    name = "headguard"
    required_tasks = None  # a server for tasks that cannot be guarded must not start unguarded

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes, and the middleware around everything."""
        install_refusals(app)
        app.include_router(administration(lambda served: served.state.headguard))
        app.add_middleware(GuardMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Meets the workers. Raises NotGuarded."""
        if engine_client is None:
            raise NotGuarded("a render server has no engine to guard: start it without headguard in VLLM_PLUGINS.")
        models = state.openai_serving_models
        base_dir = Path(engine_client.vllm_config.model_config.model)
        _check_arguments(args, models, base_dir)
        try:
            workers = await engine_client.collective_rpc("headguard_status")
        except Exception as error:
            raise NotGuarded(
                f"no worker knows the guard ({type(error).__name__}: {error}): is headguard installed where the "
                "workers run, and named in their VLLM_PLUGINS?"
            ) from error
        if not workers or not all(worker["attached"] for worker in workers):
            raise NotGuarded("the probe is not attached on every worker.")
        try:
            digest = await asyncio.to_thread(base_digest, base_dir)
        except UnsupportedModel as error:
            raise NotGuarded(str(error)) from error
        state.headguard = VllmEngine(
            engine_client,
            models,
            base_dir,
            digest,
            workers[0],
            lora_slots(engine_client.vllm_config),
            default_watch(),
            tuple(key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key),
        )


def lora_slots(config: Any) -> int:
    """Adapters that may be loaded at once; 0 without LoRA. Raises NotGuarded when they are too few for a swap."""
    lora = config.lora_config
    if lora is None:
        return 0
    # On a CPU vLLM gives rows without an adapter the weights in the last slot, so that one must stay empty.
    spare = 1 if config.device_config.device_type == "cpu" else 0
    if lora.max_loras - spare < MIN_ADAPTERS:
        raise NotGuarded(
            f"--max-loras {lora.max_loras} is too few for a swap under load: {MIN_ADAPTERS} adapters (live, new, "
            f"draining) need --max-loras {MIN_ADAPTERS + spare} or more here."
        )
    return lora.max_loras - spare


def _check_arguments(args: Namespace, models: Any, base_dir: Path) -> None:
    """Raises NotGuarded for a server with ways around the guard."""
    if not base_dir.is_dir():
        raise NotGuarded(f"{base_dir} is not a folder: the guard needs the base's files, give vLLM a local folder.")
    if (getattr(args, "api_server_count", None) or 1) > 1:
        raise NotGuarded("--api-server-count must be 1: revisions are loaded through one API server.")
    if args.lora_modules or models.lora_requests:
        raise NotGuarded("--lora-modules would serve adapters that nobody checked: load them through the gateway.")
    if models.lora_resolvers:
        raise NotGuarded("LoRA resolvers let clients load adapters: take them out of VLLM_PLUGINS.")
