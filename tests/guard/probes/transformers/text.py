"""A tiny model folder with a word-level tokenizer and chat template, made on the spot."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.guard.probes.transformers.models import build

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"]
WORDS += [f"w{i}" for i in range(61 - len(WORDS))]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer():
    """61 words, one id each; `w0` .. `w54` are ordinary words."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Sequence([decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_model(folder, **changes):
    """Writes model and tokenizer as an ordinary Hugging Face folder. Returns the folder.

    The model never ends an answer of its own accord (the end token's logit is 0, some other is always above).
    """
    model = build(**changes)
    model.lm_head.weight.data[2] = 0.0
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
