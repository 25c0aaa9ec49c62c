"""The attention probe for transformers: stock sdpa, plus one look at the queries a plan names.

transformers lets an attention function be registered by name and hands it post-rotary queries and keys. Ours calls
the stock sdpa function with the very same arguments (so its output is bit for bit the stock one) and then, if a `Plan`
travels with this forward as the keyword `guard_plan`, adds the rows of the queries that it names, and the norms of what
their tokens asked, offered and were given, to its bank.
No model code is patched and nothing global is set: a forward without a plan is an ordinary forward.

`attach` switches a model to this function and refuses, by name, every model whose attention is not plain causal
softmax over all earlier keys. What it cannot know from the configuration it finds out: it compares one short forward
with the model's own eager attention before it lets the model be served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from guard.errors import UnsupportedModel
from guard.gram import HeadGrams, log_norms
from guard.kernels.reference import prompt_rows

ATTENTION = "headguard_sdpa"
PLAN = "guard_plan"

# Largest difference between a probe row and the model's own eager attention that attach accepts, by dtype of the
# model: float32 leaves rounding only; in 16 bits the eager path itself rounds its scores (measured ~1e-3, vllm-
# integration.md 16).
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_CHECK_TOKENS = 12


@dataclass(frozen=True)
class Plan:
    """Which queries of one forward are observed, up to R of each batch row, and where their rows go. n rows observed
    out of N in the batch, m queries in all.

    rows [n] int64: batch rows, or None for all N in order; query [n, R] int64: indices among this forward's queries;
    kv_len [n, R] int64: keys visible to each; live [m] int64: which of these n R are meant, or None for all; places [m]
    int64: where in the bank; prompt_len [n] int64; width: the largest prompt_len.
    """

    bank: HeadGrams
    rows: Tensor | None
    query: Tensor
    kv_len: Tensor
    live: Tensor | None
    places: Tensor
    prompt_len: Tensor
    width: int

    def observe(self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scaling: float) -> None:
        """Adds one layer's rows and norms. query [N, H, T_q, D], key and value [N, H_kv, T, D], output [N, T_q, H, D],
        before heads are mixed."""
        index = self.rows if self.rows is not None else torch.arange(query.shape[0], device=query.device)
        keys = key if self.rows is None else key.index_select(0, self.rows)
        asked, position = query[index[:, None], :, self.query], self.kv_len - 1
        rows = prompt_rows(asked, keys, self.kv_len, self.prompt_len, scaling)
        rows = rows[..., : self.width].flatten(0, 1)
        given = output[index[:, None], self.query]
        offered = key[index[:, None], :, position], value[index[:, None], :, position]
        norms = log_norms(torch.cat((asked, given, *offered), dim=2)).flatten(0, 1)
        if self.live is not None:
            rows, norms = rows.index_select(0, self.live), norms.index_select(0, self.live)
        self.bank.add(layer, self.places, rows)
        self.bank.add_norms(self.places, norms, layer)


def probed_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    guard_plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stock sdpa attention, observed. Same arguments and result as transformers' `sdpa_attention_forward`."""
    output = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if guard_plan is not None:
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        guard_plan.observe(module.layer_idx, query, key, value, output[0], scaling)
    return output


@dataclass(frozen=True)
class AttentionShape:
    """What the probe measures in a model: L layers, H query heads, H_kv key heads of size D."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


def attach(model: Any, max_len: int) -> AttentionShape:
    """Puts the probe into `model` (a transformers causal LM) for sequences of up to `max_len` tokens.

    Raises UnsupportedModel, naming the feature, if attention rows of this model cannot be measured. The model is then
    left with the attention implementation it came with.
    """
    shape = inspect(model, max_len)
    AttentionInterface.register(ATTENTION, probed_sdpa)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    before = model.config._attn_implementation
    try:
        _verify(model, shape)
    except BaseException:
        model.set_attn_implementation(before)
        raise
    return shape


def inspect(model: Any, max_len: int) -> AttentionShape:
    """The attention shape of `model`, or UnsupportedModel with the feature that stands in the way."""
    config = model.config
    name = f"{type(model).__name__} ({getattr(config, 'model_type', 'unknown type')})"

    def refuse(feature: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"cannot measure attention of {name}: {feature}. Supported: decoder models with plain causal attention "
            "over all earlier tokens in every layer (Llama, Mistral, Qwen2, Qwen3 and alike)."
        )

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder model")
    if not getattr(model, "_supports_attention_backend", False):
        raise refuse("its attention does not go through transformers' attention interface")
    if getattr(config, "attn_logit_softcapping", None):
        raise refuse("attention logits are soft-capped")
    if getattr(config, "kv_lora_rank", None):
        raise refuse("multi-head latent attention (MLA) keeps compressed keys")
    if getattr(config, "v_head_dim", None) not in (None, getattr(config, "head_dim", None)):
        raise refuse("its values are of another size than its keys")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refuse("layers share key/value caches")
    for kind in set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise refuse(f"it has layers of type {kind!r}, which are not softmax attention over all keys")
    modules = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj") and hasattr(m, "k_proj")]
    layers = int(config.num_hidden_layers)
    if sorted(m.layer_idx for m in modules) != list(range(layers)):
        raise refuse(f"found {len(modules)} attention layers with q_proj and k_proj where {layers} were expected")
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    for module in modules:
        if getattr(module, "sinks", None) is not None:
            raise refuse("attention sinks take a share of the softmax")
        if getattr(module, "is_causal", True) is False:
            raise refuse("attention is not causal")
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
        if window is not None and types[module.layer_idx] == "sliding_attention" and window < max_len:
            raise refuse(
                f"layer {module.layer_idx} has a sliding window of {window} tokens, shorter than max_len {max_len}; "
                f"serve with max_len <= {window}"
            )
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return AttentionShape(layers, heads, kv_heads, head_dim)


@torch.inference_mode()
def _verify(model: Any, shape: AttentionShape) -> None:
    """One short forward: the rows of its last query must be those of the model's own eager attention."""
    device = next(model.parameters()).device
    tokens = min(_CHECK_TOKENS, int(model.config.vocab_size))
    ids = torch.linspace(0, model.config.vocab_size - 1, tokens, device=device).long().unsqueeze(0)
    model.set_attn_implementation("eager")
    eager = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(ATTENTION)
    bank = _RowKeeper(shape, tokens, device)
    length = torch.tensor([tokens], device=device)
    plan = Plan(bank, None, length[None] - 1, length[None], None, torch.zeros_like(length), length, tokens)
    model(input_ids=ids, use_cache=False, **{PLAN: plan})
    if not bank.complete(0, 1):
        blind = [i for i, rows in enumerate(bank.layer_rows[0].tolist()) if rows != 1]
        raise UnsupportedModel(f"the probe saw nothing in layers {blind} of {type(model).__name__}: it would be blind.")
    tolerance = _TOLERANCE.get(next(model.parameters()).dtype, 5e-2)
    for layer, (mine, theirs) in enumerate(zip(bank.kept, eager, strict=True)):
        error = (mine - theirs[0, :, -1].float()).abs().max().item()
        if not error <= tolerance:
            raise UnsupportedModel(
                f"layer {layer} of {type(model).__name__} does not attend as measured: rows differ from its eager "
                f"attention by {error:.2e} (allowed {tolerance:.0e}). Its attention has a term the probe does not know."
            )


class _RowKeeper(HeadGrams):
    """A bank of one slot that also keeps the rows themselves, for the check at attach."""

    def __init__(self, shape: AttentionShape, tokens: int, device: torch.device) -> None:
        super().__init__(1, shape.layers, shape.heads, tokens, device, kv_heads=shape.kv_heads)
        self.kept: list[Tensor] = []

    def add(self, layer: int, places: Tensor, rows: Tensor) -> None:
        super().add(layer, places, rows)
        self.kept.append(rows[0])
