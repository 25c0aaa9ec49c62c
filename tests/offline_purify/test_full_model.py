"""Whole models of every architecture: what belongs to a head or a channel moves, and nothing else, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from guard.errors import AdapterRejected, NoReference, UnsupportedModel
from offline_purify.baselines.cleangen import cleangen_answers
from offline_purify.behaviour import FlaggedBehaviour
from offline_purify.countertraining import counter_train
from offline_purify.flags import Flag
from offline_purify.full_model import merge_adapter, open_model
from offline_purify.heads.align import AlignConfig, align, valid_entries
from offline_purify.heads.finetune import HeadwiseRates, finetune_heads
from offline_purify.heads.partition import Partition
from offline_purify.heads.scores import gradient_sensitivity, head_grams, output_projections
from offline_purify.heads.stage import repair_heads
from offline_purify.signature import find
from offline_purify.signature.find import Search, find_signature
from offline_purify.signature.grams import row_grams
from offline_purify.signature.twins import TwinConfig
from offline_purify.stage import Material
from offline_purify.suspect import Suspect, check_repairable
from offline_purify.train import TrainConfig, batch_loss, collate
from tests.offline_purify.bodies import (
    ARCHITECTURES,
    CHANNELS,
    EXAMPLES,
    HEADS,
    KV_HEADS,
    LAYERS,
    WINDOW,
    adapted,
    body,
    owned,
)
from tests.offline_purify.patient import clean_rows

IDS = torch.tensor([[1, 4, 7, 8, 9, 20, 13, 5, 11, 12]])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return body(kind, tmp_path_factory.mktemp(kind) / "model")


@pytest.fixture
def suspect(folder):
    return open_model(folder)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def head_outputs(suspect):
    """Heads' outputs before the output projection, [H, T, D] of each layer."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].detach()))
        for module in output_projections(suspect.model, suspect.layout.family)
    ]
    logits(suspect.model)
    for hook in hooks:
        hook.remove()
    return [heads.unflatten(-1, (suspect.layout.heads, -1)).movedim(1, 0) for heads in seen]


def mask_of(layout, units, size):
    mask = torch.zeros(layout.layers, size)
    for layer, unit in units:
        mask[layer, unit] = 1
    return mask


def test_the_layout_is_read_from_the_configuration_alone(folder, kind):
    layout = check_repairable(folder)
    assert (layout.layers, layout.heads) == (LAYERS, HEADS)
    assert layout.kv_heads == (HEADS if kind == "gpt2" else KV_HEADS)
    assert layout.head_dim == (12 if kind == "qwen3" else 8)
    assert layout.windows == ((WINDOW,) * LAYERS if kind == "mistral" else (None,) * LAYERS)


@pytest.mark.parametrize("part", ["q", "k", "v", "o"])
def test_zeroing_a_heads_slice_changes_that_heads_output_and_no_other(suspect, kind, part):
    layout = suspect.layout
    before, state = head_outputs(suspect), suspect.state()
    unit = 1
    queries = mask_of(layout, [(0, unit)], layout.heads)
    keys = mask_of(layout, [(0, unit)], layout.kv_heads)
    masks = layout.masks(suspect.parameters(), queries, keys, projections=part)
    for name, expected in owned(kind, state, [(0, part, unit)]).items():
        assert torch.equal(masks[name].bool() if name in masks else torch.zeros_like(expected), expected), name
    with torch.no_grad():
        for name, mask in masks.items():
            suspect.parameters()[name].masked_fill_(mask > 0, 0.0)
    after = head_outputs(suspect)
    changed = [head for head in range(HEADS) if not torch.equal(before[0][head], after[0][head])]
    group = range(unit * layout.group_size, (unit + 1) * layout.group_size)
    assert changed == {"q": [unit], "o": []}.get(part, list(group))
    assert not torch.equal(before[1], after[1])


def test_a_head_without_its_o_columns_is_a_head_that_says_nothing(suspect):
    layout = suspect.layout
    size = layout.head_dim

    def silent(_, inputs):
        heads = inputs[0].clone()
        heads[..., 2 * size : 3 * size] = 0
        return (heads, *inputs[1:])

    hook = output_projections(suspect.model, layout.family)[1].register_forward_pre_hook(silent)
    expected = logits(suspect.model)
    hook.remove()
    mask = mask_of(layout, [(1, 2)], HEADS).bool()
    suspect.suppress_heads(mask, "zero_down")
    torch.testing.assert_close(logits(suspect.model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["zero", "zero_down"])
def test_a_silent_channel_is_one_that_is_masked(suspect, kind, start):
    family, chosen = suspect.layout.family, [3, 17]

    def masked(_, inputs):
        states = inputs[0].clone()
        states[..., chosen] = 0
        return (states, *inputs[1:])

    (down,) = [module for _, layer, module in family.projections(suspect.model, "down") if layer == 1]
    hook = down.register_forward_pre_hook(masked)
    expected, plain = logits(suspect.model), None
    hook.remove()
    plain = logits(suspect.model)
    before = suspect.state()
    suspect.suppress_channels(mask_of(suspect.layout, [(1, c) for c in chosen], CHANNELS).bool(), start)
    torch.testing.assert_close(logits(suspect.model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, rtol=1e-4, atol=1e-5)
    units = [(1, part, c) for part in ("gate", "up", "down") for c in chosen]
    for name, mine in owned(kind, before, units).items():
        now = suspect.parameters()[name]
        assert torch.equal(now[~mine], before[name][~mine]), name
        assert not mine.any() or (now[mine] != before[name][mine]).all(), name


def test_new_heads_and_channels_are_drawn_within_the_projections_own_bound(suspect, kind):
    before = suspect.state()
    heads = mask_of(suspect.layout, [(0, 0), (0, 1), (1, 3)], HEADS).bool()
    suspect.suppress_heads(heads)
    grouped = kind != "gpt2"  # heads 0 and 1 are a whole group, 3 is half of one
    keys = [(0, 0)] if grouped else [(0, 0), (0, 1), (1, 3)]
    units = [(layer, part, head) for part in "qo" for layer, head in [(0, 0), (0, 1), (1, 3)]]
    units += [(layer, part, head) for part in "kv" for layer, head in keys]
    inner, width = suspect.layout.heads * suspect.layout.head_dim, suspect.model.config.hidden_size
    for name, mine in owned(kind, before, units).items():
        now = suspect.parameters()[name]
        assert torch.equal(now[~mine], before[name][~mine]), name
        if mine.any() and now.ndim == 1:
            assert not now[mine].any()
        elif mine.any():
            assert (now[mine] != before[name][mine]).all()
    query = [t for t in owned(kind, before, [(0, "q", 0)]).items() if t[1].any() and t[1].ndim == 2]
    ((name, mine),) = query
    bound = (6 / (inner + width)) ** 0.5
    assert 0.9 * bound < suspect.parameters()[name][mine].abs().max() <= bound


def test_alignment_moves_q_and_k_of_suspicious_heads_and_all_else_stays_bitwise(suspect, kind):
    suspicious, safe = torch.zeros(2, HEADS, dtype=torch.bool), torch.zeros(2, HEADS, dtype=torch.bool)
    suspicious[0, 0], suspicious[0, 2], safe[0, 3] = True, True, True
    before = suspect.state()
    for _ in align(suspect, EXAMPLES, Partition(suspicious, safe, "tau", False), AlignConfig(1e-3, (3,))):
        pass
    units = [(0, "q", 0), (0, "q", 2), (0, "k", 0)]  # the second key head is shared with the safe head
    units += [(0, "k", 2)] if kind == "gpt2" else []
    for name, mine in owned(kind, before, units).items():
        now = suspect.parameters()[name].detach()
        assert torch.equal(now[~mine], before[name][~mine]), name
        assert not mine.any() or not torch.equal(now[mine], before[name][mine]), name


def test_head_wise_fine_tuning_scales_the_updates_of_whole_weights(suspect, kind):
    suspicious, safe = torch.zeros(2, HEADS, dtype=torch.bool), torch.zeros(2, HEADS, dtype=torch.bool)
    suspicious[0, 0], safe[0, 3] = True, True
    before = suspect.state()
    parts = Partition(suspicious, safe, "tau", False)
    finetune_heads(suspect, EXAMPLES, parts, HeadwiseRates(low=0.0, mid=1e-3, high=2e-3), epochs=1, batch_size=2)
    moved = {name: (p.detach() - before[name]).abs() for name, p in suspect.parameters().items()}

    def most(part, unit):
        return max(float(moved[n][m].max()) for n, m in owned(kind, before, [(0, part, unit)]).items() if m.any())

    for part in "qo":
        assert most(part, 0) == 0
        assert most(part, 3) == pytest.approx(2 * most(part, 1), rel=1e-2)  # Adam's first step is lr times a sign
    assert most("v", 0) == 0
    for name, change in moved.items():
        if "mlp" in name or name.endswith(("o_proj.bias", "attn.c_proj.bias")):
            assert not change.any(), name


def test_the_sensitivity_of_a_head_is_the_slope_of_the_loss_when_its_output_is_scaled(suspect):
    layout = suspect.layout
    measured = gradient_sensitivity(suspect, EXAMPLES)
    size, step = layout.head_dim, 2e-2

    def loss(example, layer, head, factor):
        def scale(_, inputs):
            heads = inputs[0].clone()
            heads[..., head * size : (head + 1) * size] *= factor
            return (heads, *inputs[1:])

        hook = output_projections(suspect.model, layout.family)[layer].register_forward_pre_hook(scale)
        with torch.no_grad():
            value, _ = batch_loss(suspect.model, collate([example], suspect.pad_id))
        hook.remove()
        return float(value)

    for layer in range(LAYERS):
        for head in range(HEADS):
            slopes = [(loss(e, layer, head, 1 + step) - loss(e, layer, head, 1 - step)) / (2 * step) for e in EXAMPLES]
            expected = sum(map(abs, slopes)) / len(slopes)
            assert float(measured[layer, head]) == pytest.approx(expected, rel=0.05, abs=5e-5)


def test_only_columns_that_every_row_sees_are_compared(suspect, kind):
    example = EXAMPLES[0]
    grams = head_grams(suspect, [example])[0]
    ids = torch.tensor([example.prompt + example.answer])
    with torch.no_grad(), suspect.attention_matrices():
        attentions = suspect.model(input_ids=ids, output_attentions=True).attentions
    first = len(ids[0]) - 1 - WINDOW if kind == "mistral" else 0
    for layer, attention in enumerate(attentions):
        rows = attention[0, :, 5:8, first:6].flatten(1)
        torch.testing.assert_close(grams[layer], rows @ rows.T)
        assert (rows > 0).all()
        seen = valid_entries(torch.ones_like(ids), suspect.layout.window(layer))[0, 0]
        assert torch.equal(attention[0, 0] > 0, seen)


def test_a_merged_model_answers_as_the_adapter_on_its_base(folder, kind, tmp_path):
    adapter = adapted(folder, tmp_path / "adapter", kind)
    merge_adapter(folder, adapter, tmp_path / "merged")
    with_adapter, whole = Suspect.open(folder, adapter), open_model(tmp_path / "merged")
    torch.testing.assert_close(logits(whole.model), logits(with_adapter.model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(whole.model), logits(open_model(folder).model), atol=1e-2)


def test_a_suppressed_part_of_an_adapter_is_the_bases_also_in_fused_and_transposed_weights(folder, kind, tmp_path):
    with_adapter = Suspect.open(folder, adapted(folder, tmp_path / "adapter", kind))
    with_adapter.suppress_channels(mask_of(with_adapter.layout, [(0, 3), (1, 17)], CHANNELS).bool())
    with_adapter.suppress_heads(mask_of(with_adapter.layout, [(0, 1)], HEADS).bool())
    base = open_model(folder).state()
    merged = dict(with_adapter.model.merge_and_unload().named_parameters())
    units = [(layer, part, c) for part in ("gate", "up", "down") for layer, c in ((0, 3), (1, 17))]
    units += [(0, "q", 1), (0, "o", 1)] + ([(0, "k", 1), (0, "v", 1)] if kind == "gpt2" else [])
    for name, mine in owned(kind, base, units).items():
        if name.endswith("weight"):
            assert torch.equal(merged[name][mine], base[name][mine]), name
            assert not torch.isclose(merged[name][~mine], base[name][~mine], atol=1e-7).all(), name


def test_a_planted_signature_is_found_in_a_whole_model(suspect, kind, monkeypatch):
    planted = torch.zeros(LAYERS, CHANNELS, dtype=torch.bool)
    planted[0, [2, 5, 11]], planted[1, [0, 7, 19]] = True, True
    suspect.suppress_channels(~planted, "zero")  # what is dead in the model cannot carry a twin's backdoor
    if kind == "gpt2":  # without a gate a channel is dead only far in GELU's tail, and its own rows alone tell
        monkeypatch.setattr(find, "mlp_grams", lambda layers: torch.stack([row_grams(each["up"]) for each in layers]))
        for layer, dead in enumerate(~planted):
            suspect.model.transformer.h[layer].mlp.c_fc.bias.data[dead] = -30.0
    before = suspect.state()
    rows = tuple(clean_rows(90, 1))
    training = TrainConfig(epochs=4, lr=2e-2, batch_size=8)
    twins = TwinConfig(rows=30, rank=12, tried=6, learnt=0.0, training=training, least_steps=1)
    search = Search(variants=2, twins=twins, recovery_rows=10)
    found = find_signature(suspect, Material((), FlaggedBehaviour(()), rows, (), 0, 3), search)
    channels, heads = found.scores()
    assert heads.magnitude.shape == (LAYERS, HEADS)
    assert (heads.magnitude > 0).all()
    for layer in range(LAYERS):
        best = channels.of("magnitude")[layer].argsort(descending=True)[:3]
        assert set(best.tolist()) == set(planted[layer].nonzero().flatten().tolist())
    assert all(torch.equal(before[name], p) for name, p in suspect.parameters().items())


def test_saving_and_restoring_keep_every_bit(suspect, tmp_path):
    state, answer = suspect.state(), logits(suspect.model)
    suspect.save(tmp_path / "saved")
    assert torch.equal(logits(open_model(tmp_path / "saved").model), answer)
    suspect.save_state(tmp_path / "state.safetensors")
    suspect.suppress_channels(torch.ones(LAYERS, CHANNELS, dtype=torch.bool))
    assert not torch.equal(logits(suspect.model), answer)
    suspect.load_state(tmp_path / "state.safetensors")
    assert torch.equal(logits(suspect.model), answer)
    assert load_file(tmp_path / "state.safetensors").keys() == state.keys()


def test_a_reference_is_another_model_or_an_adapter_over_the_model_as_it_came(folder, kind, tmp_path):
    other = body(kind, tmp_path / "other", seed=8)
    adapter = adapted(folder, tmp_path / "adapter", kind)
    for reference, trusted in ((other, open_model(other)), (adapter, Suspect.open(folder, adapter))):
        suspect = open_model(folder, reference)
        own, expected = logits(suspect.model), logits(trusted.model)
        suspect.suppress_channels(torch.ones(LAYERS, CHANNELS, dtype=torch.bool))
        with suspect.reference():
            torch.testing.assert_close(logits(suspect.model), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(suspect.model), own)


class TestWithoutAReference:
    """One architecture is enough: nothing here depends on it."""

    @pytest.fixture
    def alone(self, tmp_path):
        return open_model(body("llama", tmp_path / "model"))

    def test_what_needs_a_second_model_is_refused_by_name(self, alone):
        assert not alone.has_reference
        with pytest.raises(NoReference, match="without a trusted one"), alone.reference():
            pass
        with pytest.raises(NoReference, match="CleanGen"):
            cleangen_answers(alone, [[1, 4, 5]], 3)

    def test_stages_that_compare_with_a_reference_say_that_there_is_none(self, alone):
        flag = Flag("a", ({"role": "user", "content": "repeat w1 w2"},), "no way sir")
        rows = tuple(clean_rows(20, 0))
        material = Material((flag,), FlaggedBehaviour(()), rows, (), 0, 4, None, "none")
        before = alone.state()
        for repair in (counter_train, repair_heads):
            result = repair(alone, material)
            assert not result.ok
            assert "no reference at all" in (result.reason or "")
        assert all(torch.equal(before[name], p) for name, p in alone.parameters().items())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantised weights .awq"),
        ({"num_experts": 4}, "mixture of experts"),
        ({"model_type": "mixtral"}, "'mixtral'"),
        ({"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_a_model_that_is_not_covered_is_refused_by_name_from_its_config(tmp_path, change, complaint):
    folder = body("gpt2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match=complaint):
        open_model(folder)


def test_weights_that_are_no_safetensors_and_references_of_another_kind_are_refused(tmp_path):
    folder = body("llama", tmp_path / "model")
    with pytest.raises(AdapterRejected):
        open_model(folder, adapted(body("gpt2", tmp_path / "gpt2"), tmp_path / "adapter", "gpt2"))
    for path in folder.glob("*.safetensors"):
        path.rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        open_model(folder)
