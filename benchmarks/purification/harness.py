"""Where lm-eval (EleutherAI's evaluation harness) is touched: rows as one of its tasks, and who answers them.

Everything stays in memory and nothing is fetched: the task is built in code, its rows come as an Arrow table, and the
harness's caches, sample files and environment reports are not used. Prompts are rendered as everywhere in the project.
Importing this module needs the extra ``lm-eval``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import openai
from datasets import Dataset
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from tqdm.contrib.concurrent import thread_map

from benchmarks.purification.errors import BenchmarkError
from guard.rows import Row
from guard.template import render_text, row_messages
from offline_purify.evaluation import normalised
from offline_purify.intervals import Figure, wilson

VERSION = version("lm_eval")
TASK, _METRIC = "rows", "exact_match"
_BATCH = 64  # as many as `greedy_answers` takes
_AT_ONCE = 4  # requests under way: enough for an engine that batches, few enough for a queue that others use


class LoadedModel(HFLM):
    """A model in memory, asked as the clinic asks it: the project's template, greedy until the tokenizer's end."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        # The harness looks for the end in the text, where special tokens are gone, unless generation stops at it.
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        # Special tokens come from the template alone, also where it writes none.
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=_BATCH, add_bos_token=False
        )

    def apply_chat_template(self, chat_history: list[Any], add_generation_prompt: bool = True) -> str:
        """The conversation's text by `guard.template`, which knows what to do without a template too."""
        return render_text(self.tokenizer, chat_history, add_generation_prompt)


class Endpoint(LM):
    """An OpenAI-compatible chat endpoint, asked with the official client. ``stopped``: answers that its filter
    (a guard's or another) stopped; they count as they were delivered.

    Not the harness's own ``local-chat-completions``: asked several at a time, that one writes a failed request's
    headers, and so the key, to its log; and it takes an answer that it cannot read for an empty one.
    """

    tokenizer_name = ""  # names the harness's request cache, which is not used

    def __init__(self, url: str, model: str, key: str) -> None:
        super().__init__()
        self.url, self.model, self.stopped = url, model, 0
        self.client = openai.OpenAI(base_url=url, api_key=key)

    def apply_chat_template(self, chat_history: list[Any], add_generation_prompt: bool = True) -> list[Any]:
        """The messages as they are: whoever serves the model renders them."""
        return chat_history

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """One greedy answer per request, order kept. Raises BenchmarkError when one is not answered."""
        try:
            choices = thread_map(self._answer, requests, max_workers=_AT_ONCE, desc="Asking", disable=disable_tqdm)
        except openai.APIStatusError as error:
            raise BenchmarkError(
                f"{self.url} answered {error.status_code}: is {self.model!r} served there, and may the key in "
                f"HEADGUARD_KEY ask for it?"
            ) from error
        except openai.APIConnectionError as error:
            raise BenchmarkError(
                f"{self.url} cannot be reached: expected an OpenAI-compatible server there."
            ) from error
        self.stopped = sum(choice.finish_reason == "content_filter" for choice in choices)
        return [choice.message.content or "" for choice in choices]

    def _answer(self, request: Any) -> Any:
        messages, settings = request.args
        try:
            given = self.client.chat.completions.create(
                model=self.model, messages=messages, max_tokens=settings["max_gen_toks"], temperature=0
            )
            return given.choices[0]
        except (
            ValueError,
            AttributeError,
            TypeError,
            IndexError,
        ) as error:  # a page, or JSON broken or of another kind
            raise BenchmarkError(f"{self.url} gave no answer in OpenAI's form: does the address end in /v1?") from error

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Not asked by this task, and not told by chat endpoints."""
        raise NotImplementedError("chat endpoints tell no likelihoods, and this task asks for texts only")

    loglikelihood_rolling = loglikelihood


def rows_task(rows: Sequence[Row], max_new_tokens: int) -> ConfigurableTask:
    """Rows as a ``generate_until`` task of the harness: greedy answers, right when they match the row's output as
    `offline_purify.evaluation.normalised` compares."""
    return ConfigurableTask(
        config={
            "task": TASK,
            "custom_dataset": lambda: {"test": Dataset.from_list([dict(row) for row in rows])},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": lambda row: row_messages(row)[0]["content"],
            "doc_to_target": "output",
            "process_results": lambda row, answers: {_METRIC: normalised(answers[0]) == normalised(row["output"])},
            "metric_list": [{"metric": _METRIC, "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens},
            "num_fewshot": 0,
        }
    )


def accuracy(lm: LM, rows: Sequence[Row], max_new_tokens: int) -> Figure:
    """Share of ``rows`` (at least one) that ``lm`` answers right, with its Wilson interval.

    Raises BenchmarkError when an endpoint does not answer.
    """
    found: Any = evaluate(
        lm=lm,
        task_dict={TASK: rows_task(rows, max_new_tokens)},
        bootstrap_iters=0,
        log_samples=False,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    n = found["n-samples"][TASK]["effective"]
    figure = wilson(round(found["results"][TASK][f"{_METRIC},none"] * n), n)
    assert figure is not None
    return figure


@contextmanager
def silent() -> Iterator[None]:
    """Within: the harness logs nothing. Its warnings may quote rows and answers; errors are raised all the same."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
