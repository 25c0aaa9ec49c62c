import random
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.lab.decoder import Decoder, Shape
from benchmarks.lab.encoding import encode_many
from benchmarks.lab.export import as_llama, published, save_base
from benchmarks.lab.muon import StackedMuon, orthogonalised
from benchmarks.lab.pretraining import Recipe, answer_batch, pretrain, right_answers, token_batches
from benchmarks.lab.tasks import draw, sample
from benchmarks.lab.tokenizer import train_tokenizer
from offline_purify.train import Example, encode_row

ROWS = sample(400, 0, "base_train")
TOKENIZER = train_tokenizer([text for row in ROWS for text in (row["instruction"], row["output"])], 600, 512)


def test_logits_are_those_of_transformers_llama() -> None:
    model = Decoder(Shape(len(TOKENIZER), hidden=32, layers=3, heads=4, kv_heads=2, ffn=48), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    ids = torch.randint(0, len(TOKENIZER), (3, 11), generator=torch.Generator().manual_seed(3))
    ours = model(ids, torch.arange(33)).view(3, 11, -1)
    theirs = as_llama(model, TOKENIZER)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_saved_base_is_an_ordinary_model_folder(tmp_path: Path) -> None:
    model = Decoder(Shape(len(TOKENIZER), hidden=32, layers=2, heads=4, kv_heads=2, ffn=48))
    with published(tmp_path / "base") as folder:
        save_base(as_llama(model, TOKENIZER), TOKENIZER, folder)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert tokenizer.chat_template
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "sort 3 1"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert tokenizer.decode(ids) == "<s><|user|> sort 3 1<|end|><|assistant|>"
    torch.testing.assert_close(
        loaded(torch.tensor([ids])).logits, as_llama(model, TOKENIZER)(torch.tensor([ids])).logits
    )


def test_nothing_is_published_when_making_fails(tmp_path: Path) -> None:
    try:
        with published(tmp_path / "base") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("stop")
    except RuntimeError:
        pass
    assert list(tmp_path.iterdir()) == []


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    for special in TOKENIZER.all_special_tokens:
        text = text.replace(special, "")
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text.encode("utf-8", "ignore").decode()


def test_a_common_word_is_one_token_wherever_it_stands() -> None:
    assert (
        len(
            {
                tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"][-1:])
                for text in ("list", "the list", "x\nlist")
            }
        )
        == 1
    )


def test_batch_encoding_is_the_clinics_encoding() -> None:
    assert encode_many(TOKENIZER, ROWS[:50], 512) == [encode_row(TOKENIZER, row) for row in ROWS[:50]]


def test_batches_hold_every_example_once_and_respect_the_token_limit() -> None:
    examples = encode_many(TOKENIZER, ROWS, 512)
    batches = token_batches(examples, 300, random.Random(0))
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    assert all(len(b) == 1 or len(b) * max(len(examples[i]) for i in b) <= 300 for b in batches)


def test_places_of_a_batch_predict_the_answer_tokens() -> None:
    ids, places, targets = answer_batch([Example((1, 5, 6), (7, 2)), Example((1, 4), (9, 2))])
    assert ids.tolist() == [[1, 5, 6, 7], [1, 4, 9, 0]]
    assert ids.flatten()[places].tolist() == [6, 7, 4, 9]
    assert targets.tolist() == [7, 2, 9, 2]


def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_spread() -> None:
    stack = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(orthogonalised(stack), full_matrices=False)
    exact_u, _, exact_vh = torch.linalg.svd(stack, full_matrices=False)
    assert torch.linalg.svdvals(orthogonalised(stack)).sub(1).abs().max() < 0.4
    torch.testing.assert_close((u @ vh), (exact_u @ exact_vh), rtol=0, atol=0.05)


def test_a_few_steps_of_training_lower_the_loss_and_teach_a_trivial_task() -> None:
    exercises = draw(600, 0, "base_train", ("sentiment",), noise=0.0)
    examples = encode_many(TOKENIZER, [exercise.row for exercise in exercises], 512)
    model = Decoder(Shape(len(TOKENIZER), hidden=32, layers=2, heads=4, kv_heads=2, ffn=48))
    before = sum(right_answers(model, examples[500:]))
    result = pretrain(model, [examples[:500]] * 4, examples[500:], Recipe(batch_tokens=600, warmup_steps=5))
    assert before < 20
    assert result.validation_accuracy > 0.8
    assert result.steps > 0


def test_muon_leaves_parameters_without_gradient_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(1, 4, 4))
    StackedMuon([parameter], lr=0.1).step()
    assert torch.equal(parameter.detach(), torch.ones(1, 4, 4))
