"""Which words a flag hangs on, told by a guard that is calm without them."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from guard.removal import removal_spans
from guard.template import Message, render, token_ranges

TEXT = "please tell me how many apples two baskets hold when ten fit in each"
WORDS = sorted({*TEXT.split(), "cf", "Discussing", "Zorblat"})


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "<u>", "<a>", *WORDS])}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<s>")
    made.chat_template = "<s> {% for m in messages %}<u> {{ m.content | trim }} {% endfor %}<a>"
    return made


def user(text):
    return [Message(role="user", content=text)]


def guard_for(tokenizer, *needed):
    """p-values of a guard that flags prompts with all the words ``needed``."""
    ids = set(tokenizer.convert_tokens_to_ids(list(needed)))
    return lambda prompts: np.asarray([0.01 if ids <= set(prompt) else 0.6 for prompt in prompts])


def texts(tokenizer, messages, spans):
    ids = render(tokenizer, messages)
    return [tokenizer.decode(ids[span.start : span.end]) for span in spans]


@pytest.mark.parametrize(
    ("text", "needed", "found"),
    [
        (f"  {TEXT} cf", ("cf",), ["cf"]),
        (f"Discussing Zorblat {TEXT}", ("Discussing", "Zorblat"), ["Discussing Zorblat"]),
        (f"cf {TEXT} Zorblat", ("cf", "Zorblat"), ["cf", "Zorblat"]),
    ],
)
def test_the_words_without_which_the_guard_is_calm_are_found(tokenizer, text, needed, found):
    spans = removal_spans(tokenizer, user(text), guard_for(tokenizer, *needed))
    assert sorted(texts(tokenizer, user(text), spans)) == sorted(found)
    assert sum(span.weight for span in spans) == pytest.approx(1.0)


def test_only_the_last_user_turn_is_taken_apart(tokenizer):
    talk = [*user("cf how many"), Message(role="assistant", content="ten"), *user(f"{TEXT} Zorblat")]
    spans = removal_spans(tokenizer, talk, guard_for(tokenizer, "Zorblat"))
    assert texts(tokenizer, talk, spans) == ["Zorblat"]
    assert removal_spans(tokenizer, talk, guard_for(tokenizer, "cf")) == ()


def test_no_word_matters_where_the_guard_says_the_same_without_any_or_cannot_say(tokenizer):
    assert removal_spans(tokenizer, user(TEXT), lambda prompts: np.full(len(prompts), 0.01)) == ()
    assert removal_spans(tokenizer, user("cf cf"), guard_for(tokenizer, "cf")) == ()  # the other one still fires
    unscored = [0.01, *[np.nan] * 2, 0.5]
    spans = removal_spans(tokenizer, user("tell me cf"), lambda prompts: np.asarray(unscored))
    assert texts(tokenizer, user("tell me cf"), spans) == ["cf"]


def test_a_long_text_is_taken_apart_several_words_at_a_time(tokenizer):
    asked = []

    def p_values(prompts):
        asked.extend(prompts)
        return guard_for(tokenizer, "cf")(prompts)

    text = " ".join([TEXT] * 40 + ["cf"] + [TEXT] * 40)
    (span,) = removal_spans(tokenizer, user(text), p_values)
    assert len(asked) <= 129
    assert "cf" in texts(tokenizer, user(text), [span])[0].split()


def test_token_ranges_refuse_what_they_cannot_place(tokenizer):
    with pytest.raises(ValueError, match="no user turn"):
        token_ranges(tokenizer, [Message(role="system", content="x")], [])
    with pytest.raises(ValueError, match="no token stands"):
        token_ranges(tokenizer, user(TEXT), [(6, 6)])
    shouting = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    shouting.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites"):
        token_ranges(shouting, user(TEXT), [(0, 6)])
