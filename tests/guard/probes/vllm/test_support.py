"""What the probe refuses to measure, by name, on vLLM's own layers and configuration."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from guard.errors import UnsupportedModel
from guard.probes.vllm.plugin import register
from guard.probes.vllm.support import attention_layers, check_engine, check_version

pytest.importorskip("vllm")
CONTEXT = 512


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes an attention layer as vLLM makes it for a tiny Llama on a CPU."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention

    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(hidden_size=256, num_attention_heads=8, num_key_value_heads=4, architectures=["LlamaForCausalLM"],
                max_position_embeddings=CONTEXT, vocab_size=64).save_pretrained(folder)  # fmt: skip
    config = EngineArgs(model=str(folder), skip_tokenizer_init=True, dtype="float32").create_engine_config()

    def make(name: str, **more: Any) -> Any:
        config.compilation_config.static_forward_context.pop(name, None)
        with set_current_vllm_config(config):
            made = Attention(8, 32, 32**-0.5, num_kv_heads=4, cache_config=config.cache_config, prefix=name, **more)
        made.isa = "vec"
        return made

    return make


def engine(**changed: Any) -> Any:
    """The parts of a `VllmConfig` that are looked at, as vLLM sets them on a CPU, with some changed."""
    plain: dict[str, Any] = {
        "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
        "scheduler_config": {"async_scheduling": False},
        "model_config": {"runner_type": "generate", "is_encoder_decoder": False},
        "compilation_config": {"cudagraph_mode": SimpleNamespace(name="NONE")},
        "speculative_config": None,
    }
    for path, value in changed.items():
        section, _, name = path.partition("__")
        if name:
            plain[section] = {**plain[section], name: value}
        else:
            plain[section] = value
    return SimpleNamespace(**{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in plain.items()})


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.32.1+cpu"])
def test_another_vllm_is_refused_loudly(version: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"knows vLLM 0\.32\.0 and found"):
        check_version(version)
    check_version("0.32.0+cpu")


def test_the_plugin_does_nothing_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    before = Scheduler.update_from_output
    for named in ("", "lora_filesystem_resolver"):
        monkeypatch.setenv("VLLM_PLUGINS", named)
        register()
    assert Scheduler.update_from_output is before


@pytest.mark.parametrize(
    ("changed", "feature"),
    [
        ({"parallel_config__tensor_parallel_size": 2}, "tensor parallelism"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__data_parallel_size": 2}, "data parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__enable_dbo": True}, "micro-batching"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"scheduler_config__async_scheduling": True}, "--no-async-scheduling"),
        ({"model_config__runner_type": "pooling"}, "pooling models"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
        (
            {"compilation_config__cudagraph_mode": SimpleNamespace(name="FULL_AND_PIECEWISE")},
            "cudagraph_mode=PIECEWISE",
        ),
    ],
)
def test_an_engine_under_which_a_verdict_could_be_wrong_is_refused_by_name(changed: Any, feature: str) -> None:
    with pytest.raises(UnsupportedModel, match=feature):
        check_engine(engine(**changed))
    check_engine(engine())


@pytest.mark.parametrize(
    ("more", "feature"),
    [
        ({"per_layer_sliding_window": 64}, "sliding window of 64 tokens"),
        ({"logits_soft_cap": 30.0}, "soft-capped"),
        ({"alibi_slopes": [0.1] * 8}, "alibi"),
        ({"sinks": torch.zeros(8)}, "attention sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0.attn"}, "shared between layers"),
    ],
)
def test_a_layer_that_does_not_attend_plainly_is_refused_by_name(layer: Any, more: Any, feature: str) -> None:
    layers = {
        "model.layers.0.attn": layer("model.layers.0.attn"),
        "model.layers.1.attn": layer("model.layers.1.attn", **more),
    }
    with pytest.raises(UnsupportedModel, match=feature):
        attention_layers(layers, CONTEXT, cpu=True)


def test_values_of_another_size_than_keys_are_refused(layer: Any) -> None:
    strange = layer("model.layers.0.attn")
    strange.head_size_v = 8
    with pytest.raises(UnsupportedModel, match="values of another size"):
        attention_layers({"model.layers.0.attn": strange}, CONTEXT, cpu=True)


def test_layers_come_in_the_order_of_the_model_and_a_wide_window_is_no_window(layer: Any) -> None:
    names = [f"model.layers.{i}.attn" for i in (10, 2, 0)]
    layers = attention_layers({n: layer(n, per_layer_sliding_window=CONTEXT) for n in names}, CONTEXT, cpu=True)
    assert [found.name for found in layers] == names[::-1]
    assert {(found.heads, found.layout) for found in layers} == {(8, "vec")}


def test_a_cache_layout_that_nobody_can_read_is_refused(layer: Any) -> None:
    strange = layer("model.layers.0.attn")
    strange.isa = "neon"
    with pytest.raises(UnsupportedModel, match="neon"):
        attention_layers({"model.layers.0.attn": strange}, CONTEXT, cpu=True)


@pytest.mark.parametrize(("field", "value"), [("isa", "amx"), ("num_kv_heads", 1), ("head_size", 64)])
def test_caches_that_differ_between_layers_are_refused_on_a_cpu(layer: Any, field: str, value: Any) -> None:
    layers = {name: layer(name) for name in ("model.layers.0.attn", "model.layers.1.attn")}
    setattr(layers["model.layers.1.attn"], field, value)
    if field == "head_size":
        layers["model.layers.1.attn"].head_size_v = value
    with pytest.raises(UnsupportedModel, match="different layout or shape"):
        attention_layers(layers, CONTEXT, cpu=True)
