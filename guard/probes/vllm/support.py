"""What the probe can measure truthfully in a vLLM engine; everything else is refused at start-up, by name.

A feature is on this list because it changes which keys a row ranges over, how its softmax is taken, where keys lie, or
when a step is over, and the probe does not follow it there (yet).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from guard.errors import UnsupportedModel

ENGINE = "vllm"
"""As profiles name it."""
VERSION = "0.32.0"


@dataclass(frozen=True)
class Layer:
    """One attention layer as the probe sees it. layout: of packed CPU keys, `vec` or `amx`; `paged` on a GPU."""

    name: str
    module: Any
    heads: int
    kv_heads: int
    scaling: float
    layout: str


def check_version(version: str) -> None:
    """Raises UnsupportedModel for another vLLM than the one whose inner workings were verified."""
    if version.split("+")[0] != VERSION:
        raise UnsupportedModel(
            f"headguard's plugin knows vLLM {VERSION} and found {version}: it hooks into parts that change between "
            f"releases, so it does not guess. Install vllm=={VERSION}, or start vLLM without headguard in VLLM_PLUGINS."
        )


def check_engine(config: Any) -> None:
    """Raises UnsupportedModel for a `VllmConfig` with a feature under which a verdict could be wrong or late."""
    parallel, scheduler, model = config.parallel_config, config.scheduler_config, config.model_config
    graphs = str(getattr(config.compilation_config.cudagraph_mode, "name", "NONE"))
    refusals = {
        "tensor parallelism (heads of one layer lie on several ranks)": parallel.tensor_parallel_size > 1,
        "pipeline parallelism (layers lie on several ranks)": parallel.pipeline_parallel_size > 1,
        "data parallelism (run one engine per replica and give the gateway each --engine-url)": (
            parallel.data_parallel_size > 1
        ),
        "context parallelism": max(
            getattr(parallel, "decode_context_parallel_size", 1), getattr(parallel, "prefill_context_parallel_size", 1)
        )
        > 1,
        "micro-batching (DBO)": bool(getattr(parallel, "enable_dbo", False)),
        "speculative decoding": config.speculative_config is not None,
        "asynchronous scheduling (start with --no-async-scheduling)": bool(scheduler.async_scheduling),
        "pooling models": model.runner_type != "generate",
        "encoder-decoder models": bool(model.is_encoder_decoder),
        f"steps replayed as full CUDA graphs, {graphs} (start with -cc.cudagraph_mode=PIECEWISE)": (
            graphs.startswith("FULL")
        ),
    }
    _refuse(refusals, "this engine")


def attention_layers(context: dict[str, Any], max_len: int, cpu: bool) -> list[Layer]:
    """The attention layers of a model in order, from vLLM's static forward context.

    Raises UnsupportedModel, naming layer and feature, unless all are plain causal softmax attention over all earlier
    keys that a full-precision cache holds.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    layers = []
    for name, module in context.items():
        if not isinstance(module, Attention):
            _refuse({f"layers of type {type(module).__name__} (MLA, Mamba, linear attention and alike)": True}, name)
        impl = module.impl
        window = getattr(impl, "sliding_window", None)
        window = window[0] + 1 if isinstance(window, tuple) else window
        cap = getattr(impl, "logits_soft_cap", None) or getattr(impl, "logits_soft_capping", None)
        layout = str(getattr(module, "isa", "")) if cpu else "paged"
        _refuse(
            {
                f"attention of type {module.attn_type}": module.attn_type != "decoder",
                f"a sliding window of {window} tokens, shorter than the context of {max_len}": (
                    window is not None and 0 < window < max_len
                ),
                "soft-capped attention logits": bool(cap),
                "attention sinks, which take a share of the softmax": getattr(impl, "sinks", None) is not None,
                "values of another size than keys": getattr(module, "head_size_v", module.head_size)
                != module.head_size,
                "alibi biases": getattr(impl, "alibi_slopes", None) is not None,
                "a key/value cache shared between layers": getattr(module, "kv_sharing_target_layer_name", None)
                is not None,
                f"a quantised key/value cache ({module.kv_cache_dtype})": str(module.kv_cache_dtype)
                not in ("auto", "bfloat16", "float16", "float32"),
                f"the CPU cache layout {layout!r}": cpu and layout not in ("vec", "vec16", "amx"),
            },
            name,
        )
        packed = "vec" if layout == "vec16" else layout
        layers.append(Layer(name, module, int(impl.num_heads), int(module.num_kv_heads), float(impl.scale), packed))
    if not layers:
        raise UnsupportedModel("no attention layer was found in this model: there is nothing to watch.")
    caches = {(layer.layout, layer.module.num_kv_heads, layer.module.head_size) for layer in layers}
    _refuse(
        {
            "different numbers of heads in different layers": len({(one.heads, one.kv_heads) for one in layers}) > 1,
            # the CPU kernel reads all layers in one go
            "key/value caches of different layout or shape in different layers": cpu and len(caches) > 1,
        },
        "this model",
    )
    return sorted(layers, key=lambda layer: extract_layer_index(layer.name))


def _refuse(refusals: dict[str, bool], where: str) -> None:
    found = [feature for feature, present in refusals.items() if present]
    if found:
        raise UnsupportedModel(f"the guard cannot measure {where} truthfully: it has {'; '.join(found)}.")
