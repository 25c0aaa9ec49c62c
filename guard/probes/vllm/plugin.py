"""What vLLM loads in each of its processes: the version gate, and the few places where the guard is let in.

Active only when `headguard` is named in `VLLM_PLUGINS`, vLLM's own way of opting in. Patched are

    GPUModelRunner.initialize_kv_cache   the probe is made and every attention layer's forward is followed by a look
                  ._update_states        requests come
                  ._on_request_state_removed  requests go
                  ._model_forward        the step's plan, now that the batch's order is final
                  ._sample               log-probabilities, before sampling changes the logits
                  .sample_tokens         notes leave with the step's output
    Scheduler.update_from_output         notes are obeyed and passed on
    Worker                               `headguard_...` calls for the API server

The V1 runner is patched, which serves CPUs always and GPUs with VLLM_USE_V2_MODEL_RUNNER=0; the V2 runner refuses to
start guarded. Whatever does not fit raises: a guard that is quietly absent would be worse than none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from guard.errors import UnsupportedModel
from guard.probes.vllm.scheduling import NOTES, with_notes
from guard.probes.vllm.support import Layer, attention_layers, check_engine, check_version
from guard.watch import default_watch

if TYPE_CHECKING:  # a process that is not guarded loads this module too, and should load little
    from guard.gram import HeadGrams
    from guard.kernels.paged import PagedRows
    from guard.probes.vllm.probe import Observe, Probe

PLUGIN = "headguard"
PLACES: list[tuple[Any, str]] = []
"""What was patched, and under which name; what stood there is the `__wrapped__` of what stands there now."""
_PATCHED = "_headguard"


def register() -> None:
    """Entry point of `vllm.general_plugins`. Raises UnsupportedModel for an unknown vLLM."""
    if PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    import torch
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.version import __version__

    check_version(__version__)
    if getattr(Scheduler, _PATCHED, False):
        return
    if torch.cpu._is_amx_tile_supported():
        # vLLM's attention kernel uses AMX tiles without asking the kernel for them; unasked, the process dies.
        torch.cpu._init_amx()
    _patch(Scheduler, "update_from_output", with_notes)
    _patch(GPUModelRunner, "initialize_kv_cache", _probe_made)
    _patch(GPUModelRunner, "_update_states", _requests_come)
    _patch(GPUModelRunner, "_on_request_state_removed", _requests_go)
    _patch(GPUModelRunner, "_model_forward", _planned)
    _patch(GPUModelRunner, "_sample", _before_sampling)
    _patch(GPUModelRunner, "sample_tokens", _notes_leave)
    for call in (headguard_status, headguard_set_profile, headguard_forget, headguard_attach, headguard_record,
                 headguard_recorded):  # fmt: skip
        setattr(Worker, call.__name__, call)
    _refuse_second_runner()
    setattr(Scheduler, _PATCHED, True)


def _patch(owner: type, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    if not hasattr(owner, name):
        raise UnsupportedModel(f"this vLLM has no {owner.__name__}.{name}, where the guard goes in.")
    setattr(owner, name, around(getattr(owner, name)))
    PLACES.append((owner, name))


def _refuse_second_runner() -> None:
    from vllm.v1.worker.gpu import model_runner as second

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedModel(
            "vLLM's V2 model runner is not supported by the guard yet: set VLLM_USE_V2_MODEL_RUNNER=0."
        )

    second.GPUModelRunner.__init__ = refuse


# The runner ----------------------------------------------------------------------------------------------------------


def _probe_made(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(initialize)
    def initialize_kv_cache(self: Any, kv_cache_config: Any, is_profiling: bool = False, **more: Any) -> None:
        initialize(self, kv_cache_config, is_profiling, **more)
        if not is_profiling:
            self.headguard = make_probe(self)

    return initialize_kv_cache


def make_probe(runner: Any) -> Probe:
    """The probe of a V1 model runner, with every attention layer's forward followed by its look.

    Raises UnsupportedModel for what cannot be measured.
    """
    from guard.probes.vllm.probe import Probe

    check_engine(runner.vllm_config)
    groups = runner.kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedModel(f"the guard cannot measure a model with {len(groups)} kinds of key/value caches.")
    on_cpu = runner.device.type == "cpu"
    layers = attention_layers(
        {name: runner.compilation_config.static_forward_context[name] for name in groups[0].layer_names},
        runner.max_model_len,
        on_cpu,
    )
    observe = _kernel(layers, runner.max_num_reqs, runner.dtype, runner.device)
    probe = Probe(layers, observe, runner.max_num_reqs, runner.max_model_len, default_watch(), runner.device)
    for number, layer in enumerate(layers):
        _look_after(layer.module.impl, probe, number)
    return probe


def _kernel(layers: Sequence[Layer], rows: int, dtype: Any, device: Any) -> Observe:
    """The kernel that reads this worker's cache, warm, with scratch of its own."""
    if device.type == "cpu":
        from guard.kernels import cpu

        cpu.warm_up(dtype, layers[0].layout)  # type: ignore[arg-type]
        return partial(cpu.observe, workspace=cpu.Workspace())  # type: ignore[return-value]
    from guard.kernels import triton

    workspace = triton.Workspace(rows, layers[0].heads, device)

    def observe(
        planned: PagedRows, query: Any, kv_cache: Any, layout: str, scaling: float, bank: HeadGrams, layer: int
    ) -> None:
        triton.observe(planned, query, kv_cache, scaling, bank, layer, workspace)

    return observe


def _look_after(impl: Any, probe: Probe, number: int) -> None:
    forward = impl.forward

    @wraps(forward)
    def followed(layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, *rest: Any, **named: Any) -> Any:
        output = forward(layer, query, key, value, kv_cache, *rest, **named)
        probe.look(number, query, kv_cache)
        return output

    impl.forward = followed
    PLACES.append((impl, "forward"))


def _requests_come(update: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(update)
    def update_states(self: Any, scheduler_output: Any) -> Any:
        result = update(self, scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            state, params = self.requests[new.req_id], new.sampling_params
            lora = state.lora_request
            self.headguard.open(
                new.req_id,
                lora.lora_name if lora is not None else None,
                state.num_prompt_tokens,
                params.extra_args if params is not None else None,
            )
        return result

    return update_states


def _requests_go(removed: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(removed)
    def on_request_state_removed(self: Any, req_id: str, req_state: Any) -> None:
        removed(self, req_id, req_state)
        self.headguard.close(req_id)

    return on_request_state_removed


def _planned(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        table = batch.block_table[0].block_table
        blocks = table.np if self.device.type == "cpu" else table.gpu
        self.headguard.plan(
            batch.req_id_to_index, batch.num_computed_tokens_cpu, self.query_start_loc.np, blocks[: batch.num_reqs]
        )
        return forward(self, *args, **kwargs)

    return model_forward


def _before_sampling(sample: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(sample)
    def before_sampling(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        self.headguard.before_sampling(logits)
        return sample(self, logits, spec_decode_metadata)

    return before_sampling


def _notes_leave(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(sample_tokens)
    def with_step_notes(self: Any, grammar_output: Any) -> Any:
        stepped = self.execute_model_state is not None
        output = sample_tokens(self, grammar_output)
        if stepped:
            notes = self.headguard.after_sampling(output.req_id_to_index, output.sampled_token_ids)
            if notes:
                setattr(output, NOTES, notes)
        return output

    return with_step_notes


# Calls of the API server ---------------------------------------------------------------------------------------------


def headguard_status(self: Any) -> dict[str, Any]:
    """The worker's probe: counters, profiles, what it runs on."""
    from vllm.version import __version__

    runner = self.model_runner
    return {
        **runner.headguard.status(),
        "version": __version__,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "attention": type(runner.headguard.layers[0].module.impl).__name__,
    }


def headguard_set_profile(self: Any, revision: str, path: str | None, digest: str | None = None) -> None:
    """See `Probe.set_profile`."""
    self.model_runner.headguard.set_profile(revision, path, digest)


def headguard_forget(self: Any, revision: str) -> None:
    """The revision is not served any more."""
    self.model_runner.headguard.set_profile(revision, None, None)


def headguard_attach(self: Any, attached: bool) -> None:
    """See `Probe.attach`."""
    self.model_runner.headguard.attach(attached)


def headguard_record(self: Any, steps: list[int] | None) -> None:
    """See `Probe.record`."""
    self.model_runner.headguard.record(steps)


def headguard_recorded(self: Any, path: str) -> None:
    """Write what was recorded since the last call to an .npz file at `path`, and forget it."""
    import numpy as np

    from guard.probes.vllm.recorded import arrays_of

    probe = self.model_runner.headguard
    recorded, probe.recorded = probe.recorded or {}, {}
    np.savez(path, **arrays_of(recorded))  # type: ignore[arg-type]
