"""How the guard is let into a model runner: the probe is made, and looks after every attention layer's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from guard.errors import UnsupportedModel
from guard.probes.vllm.scheduling import NOTES
from guard.probes.vllm.support import Layer, attention_layers, check_engine
from guard.watch import default_watch

if TYPE_CHECKING:  # a process that is not guarded loads this module too, and should load little
    from guard.gram import HeadGrams
    from guard.probes.vllm.probe import Probe, Reader

Around = Callable[[Callable[..., Any]], Callable[..., Any]]
PLACES: list[tuple[Any, str]] = []
"""What was patched, and under which name; what stood there is the `__wrapped__` of what stands there now."""


def let_in(owner: type, name: str, around: Around) -> None:
    """Puts `around(what stands there)` in a class. Raises UnsupportedModel when nothing stands there."""
    if not hasattr(owner, name):
        raise UnsupportedModel(f"this vLLM has no {owner.__name__}.{name}, where the guard goes in.")
    setattr(owner, name, around(getattr(owner, name)))
    PLACES.append((owner, name))


def probe_made(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """Around `initialize_kv_cache`: the caches are there, so the probe can be."""

    @wraps(initialize)
    def initialize_kv_cache(
        self: Any, kv_cache_config: Any, is_profiling: bool = False, *more: Any, **named: Any
    ) -> None:
        initialize(self, kv_cache_config, is_profiling, *more, **named)
        if not is_profiling:
            self.headguard = make_probe(self)

    return initialize_kv_cache


def request_comes(runner: Any, request_id: str, prompt_tokens: int, lora: Any, params: Any) -> None:
    """Opens a request, by vLLM's LoRA request and sampling parameters (None: none)."""
    revision = lora.lora_name if lora is not None else None
    runner.headguard.open(request_id, revision, prompt_tokens, params.extra_args if params is not None else None)


def notes_leave(runner: Any, output: Any) -> None:
    """Puts the step's notes on its output, whose tokens are known."""
    notes = runner.headguard.after_sampling(output.req_id_to_index, output.sampled_token_ids)
    if notes:
        setattr(output, NOTES, notes)


def make_probe(runner: Any) -> Probe:
    """The probe of a model runner, with every attention layer's forward followed by its look.

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
    reader = _reader(layers, runner.max_num_reqs, runner.dtype, runner.device)
    probe = Probe(layers, reader, runner.max_num_reqs, runner.max_model_len, default_watch(), runner.device)
    for number, layer in enumerate(layers):
        _look_after(layer.module.impl, probe, number)
    return probe


def _reader(layers: Sequence[Layer], requests: int, dtype: Any, device: Any) -> Callable[[HeadGrams], Reader]:
    """What makes the reader of this worker's cache, compiled and with scratch of its own: room for the prompt rows of
    all requests at once, divided for one row of each."""
    if device.type == "cpu":
        from guard.kernels import cpu

        layout: Any = layers[0].layout
        cpu.warm_up(dtype, layout)
        return lambda bank: cpu.Reader(bank, layout)
    from guard.gram import PROMPT_ROWS
    from guard.kernels import triton

    workspace = triton.Workspace(PROMPT_ROWS * requests, layers[0].heads, device, usual=requests)
    return lambda bank: triton.Reader(bank, workspace)


def _look_after(impl: Any, probe: Probe, number: int) -> None:
    forward = impl.forward

    @wraps(forward)
    def followed(layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, *rest: Any, **named: Any) -> Any:
        returned = forward(layer, query, key, value, kv_cache, *rest, **named)
        output = named.get("output", returned)  # vLLM has it written into a tensor of its own
        probe.look(number, query, key, value, output, kv_cache)
        return returned

    impl.forward = followed
    PLACES.append((impl, "forward"))
