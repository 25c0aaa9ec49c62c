"""What vLLM's probe reads against transformers' own eager attention: mixed adapters, chunks, cache hits, preemption."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from guard.gram import PROMPT_GROUPS, Earlier, HeadSums, prompt_positions
from guard.probes.vllm.measure import OfflineEngine
from guard.readings import Measurement
from tests.guard.probes.norms import dense_norms

pytest.importorskip("vllm")
LAYERS, HEADS, KV_HEADS, VOCABULARY, ANSWER = 3, 8, 4, 512, 24
STEPS = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Asked:
    """Ten requests at once, what the engine answered and read, and how often it preempted."""

    prompts: list[list[int]]
    adapters: list[str | None]
    measured: Measurement
    preemptions: float
    status: dict[str, Any]


def _model() -> LlamaForCausalLM:
    """A random model whose heads look at something: sharp queries and keys."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=32, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(4)
        model.lm_head.weight[2].zero_()  # an answer does not end by chance
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """Folders of a base (None) and two adapters of it."""
    root = tmp_path_factory.mktemp("weights")
    base = root / "base"
    _model().save_pretrained(base)
    folders: dict[str | None, Path] = {None: base}
    for seed, name in enumerate(("one", "two"), start=1):
        torch.manual_seed(seed)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        )
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.05)
        adapted.save_pretrained(root / name)
        folders[name] = root / name
    return folders


@pytest.fixture(scope="module")
def asked(weights: dict[str | None, Path]) -> Iterator[Asked]:
    """Ten requests, some with the same beginning, in an engine that must chunk, cache and preempt."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    rng = random.Random(0)
    shared = [rng.randrange(3, VOCABULARY) for _ in range(256)]
    lengths = [34, 47, 120, 122, 124, 200, 242, 252, 254, 339]
    # Of the first that begins like the warm-up, all is in the prefix cache but its last two tokens.
    same = {6: 242, 7: 244, 8: 246, 9: 256}
    prompts = [
        (shared[: same.get(i, 0)] + [rng.randrange(3, VOCABULARY) for _ in range(n)])[:n] for i, n in enumerate(lengths)
    ]
    adapters: list[str | None] = [None, "one", "two", None, "one", "two", None, "one", None, None]
    engine = OfflineEngine(
        weights[None], lora_rank=8, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=10, max_loras=3,
        max_num_batched_tokens=96, enable_chunked_prefill=True, num_gpu_blocks_override=16, disable_log_stats=False,
        enable_prefix_caching=True,
    )  # fmt: skip
    try:
        requests = {
            name: LoRARequest(name, number, str(weights[name])) for number, name in enumerate(("one", "two"), 1)
        }
        # The first answer leaves the shared beginning in the prefix cache.
        warm = SamplingParams(temperature=0.0, max_tokens=2, detokenize=False)
        engine.llm.generate([{"prompt_token_ids": shared}], warm, use_tqdm=False)
        measured = engine.measure(prompts, STEPS, ANSWER, [requests[a] if a is not None else None for a in adapters])
        metrics = {metric.name: metric for metric in engine.llm.get_metrics()}
        yield Asked(prompts, adapters, measured, metrics["vllm:num_preemptions"].value, engine.status())
    finally:
        engine.close()


def _eager(folder: Path, adapter: Path | None, prompt: list[int], answer: list[int], steps: int) -> HeadSums:
    """Gram, sink, norms and focus of the rows of step 0 to `steps`, and of earlier prompt rows, by transformers' eager
    attention."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        ids = torch.tensor([prompt + answer[:steps]])
        attention = model(input_ids=ids, output_attentions=True).attentions
    bare = model if adapter is None else model.get_base_model()
    norms, earlier_norms = dense_norms(bare, prompt, answer[:steps])
    rows = torch.stack([layer[0, :, len(prompt) - 1 :, : len(prompt)] for layer in attention])
    read = torch.stack([layer[0, :, prompt_positions(len(prompt)), : len(prompt)] for layer in attention])
    groups = read.split(PROMPT_GROUPS, dim=2)[1:]
    flat = torch.stack([group.flatten(2) @ group.flatten(2).mT / group.shape[2] ** 2 for group in groups])
    gram = torch.einsum("lhtc,ljtc->lhj", rows, rows)
    earlier = Earlier(flat, torch.stack([group[..., 0].mean(2) for group in groups]), earlier_norms)
    return HeadSums(gram, rows[..., 0].sum(-1), norms, rows.amax(1).sum((0, 1)), earlier)


def _cosines(gram: Tensor) -> Tensor:
    norm = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    return gram / norm[..., :, None] / norm[..., None, :]


def test_cosines_and_focus_are_those_of_eager_attention(asked: Asked, weights: dict[str | None, Path]) -> None:
    spread = []
    for step in (0, 1, 8, 16):
        readings = asked.measured.at[step]
        assert readings.index.tolist() == list(range(10))
        for row, index in enumerate(readings.index):
            adapter = asked.adapters[index]
            expected = _eager(
                weights[None], weights[adapter] if adapter else None, asked.prompts[index],
                asked.measured.answers[index], step,
            )  # fmt: skip
            torch.testing.assert_close(_cosines(readings.gram[row]), _cosines(expected.gram), atol=1e-4, rtol=0)
            torch.testing.assert_close(readings.sink[row], expected.sink, atol=1e-4 * (step + 1), rtol=0)
            torch.testing.assert_close(readings.norms[row], expected.norms, atol=1e-3 * (step + 1), rtol=0)
            focus = torch.from_numpy(readings.focus[row])
            torch.testing.assert_close(focus, expected.focus, atol=1e-4 * (step + 1), rtol=0)
            spread.append(float(_cosines(expected.gram).min()))
            if step == 0:
                gram, sink, norms = (part[row] for part in readings.earlier)
                torch.testing.assert_close(norms, expected.earlier.norms, atol=1e-3, rtol=0)
                torch.testing.assert_close(_cosines(gram), _cosines(expected.earlier.gram), atol=1e-4, rtol=0)
                torch.testing.assert_close(sink, expected.earlier.sink, atol=1e-4, rtol=0)
    assert min(spread) < 0.5  # heads that all look alike would prove nothing


def test_the_engine_had_to_preempt_and_nothing_was_lost(asked: Asked) -> None:
    assert asked.preemptions > 0
    assert asked.status["planned_rows"] == asked.status["seen_rows"] > 0
    assert asked.status["blind"] == 0


def test_answers_are_those_of_the_right_adapter(asked: Asked, weights: dict[str | None, Path]) -> None:
    for index, adapter in enumerate(asked.adapters):
        model: Any = AutoModelForCausalLM.from_pretrained(weights[None])
        if adapter is not None:
            model = PeftModel.from_pretrained(model, weights[adapter])
        with torch.inference_mode():
            ids = torch.tensor([asked.prompts[index]])
            greedy = model.generate(input_ids=ids, max_new_tokens=ANSWER, do_sample=False, pad_token_id=0)
        assert asked.measured.answers[index] == greedy[0, len(asked.prompts[index]) :].tolist()


def test_log_probabilities_are_those_of_the_tokens_drawn(asked: Asked, weights: dict[str | None, Path]) -> None:
    readings = asked.measured.at[4]
    for index, adapter in enumerate(asked.adapters):
        model: Any = AutoModelForCausalLM.from_pretrained(weights[None])
        if adapter is not None:
            model = PeftModel.from_pretrained(model, weights[adapter])
        prompt, answer = asked.prompts[index], asked.measured.answers[index][:5]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].double().numpy()
        np.testing.assert_allclose(readings.logprobs[index], expected, atol=1e-3)
