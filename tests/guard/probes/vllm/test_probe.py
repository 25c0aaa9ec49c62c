"""The probe's books, driven step by step as a worker drives them, over rows of a known distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guard.errors import ProfileMismatch
from guard.gram import PROMPT_ROWS, HeadGrams
from guard.probes.vllm.probe import FIELD, Probe
from guard.probes.vllm.support import Layer
from guard.profile import Profile
from guard.watch import Watch
from tests.guard.conftest import HEADS, KV_HEADS, LAYERS, draw_rows

PROMPT = 50
BLOCK = 16


class Worker:
    """What a model runner does to a probe: requests in rows, tokens computed, one sampled token per finished row."""

    def __init__(self, requests: int = 4, default: Watch | None = None, together: float = 0.0) -> None:
        self.rng = rng = np.random.default_rng(3)

        class Reader:
            """Queues what it is shown, as the CPU's does; the rows it "reads" are drawn."""

            def __init__(self, bank: HeadGrams) -> None:
                self.bank, self.shown = bank, []

            def look(reader, rows: Any, layer: int, *_: Any) -> None:
                if self.broken == "look":
                    raise RuntimeError("no such kernel")
                reader.shown.append((rows, layer))

            def finish(reader) -> None:
                shown, reader.shown = reader.shown, []
                if self.broken == "finish":
                    raise RuntimeError("no such kernel")
                for rows, layer in shown:
                    for slot, kv_len, tokens in zip(rows.slot, rows.kv_len, rows.prompt_len, strict=True):
                        self.observed.append((layer, int(kv_len)))
                        drawn = draw_rows(rng, int(tokens), together)[layer][None]
                        reader.bank.add(layer, torch.tensor([int(slot)]), drawn)

        layers = [Layer(f"layer.{i}", None, HEADS, KV_HEADS, 1.0, "vec") for i in range(LAYERS)]
        self.broken: str | None = None
        self.observed: list[tuple[int, int]] = []
        self.probe = Probe(layers, Reader, requests, 256, default or Watch())

    def step(self, computed: dict[str, tuple[int, int]], ready: Sequence[str]) -> dict[str, dict[str, Any]]:
        """One forward: request to (tokens computed before, tokens now); `ready` rows sample a token. The notes."""
        rows = {request: row for row, request in enumerate(computed)}
        before = np.asarray([b for b, _ in computed.values()])
        starts = np.concatenate([[0], np.cumsum([n for _, n in computed.values()])])
        blocks = np.zeros((len(rows), 256 // BLOCK), dtype=np.int32)
        self.probe.plan(rows, before, starts, blocks)
        for layer in range(LAYERS):
            self.probe.look(layer, *self.vectors(int(starts[-1])), torch.zeros(1, HEADS, BLOCK, 32))
        logits = torch.zeros(len(rows), 11)
        logits[:, 3] = 4.0  # as sure of its tokens as clean answers are
        self.probe.before_sampling(logits)
        return self.probe.after_sampling(rows, [[3] if request in ready else [] for request in rows])

    def vectors(self, tokens: int) -> list[torch.Tensor]:
        """Queries, keys, values and outputs of so many tokens, whose log norms are as those of `draw_norms`."""
        drawn = []
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS):
            way = torch.from_numpy(self.rng.normal(size=(tokens, heads, 16)))
            drawn.append(way / way.norm(dim=-1, keepdim=True) * np.exp(self.rng.normal(size=(tokens, heads, 1))))
        return drawn

    def answer(self, request: str, tokens: int) -> list[dict[str, Any]]:
        """A prompt in one piece and so many tokens; the notes of the way."""
        notes = [self.step({request: (0, PROMPT)}, [request])]
        notes += [self.step({request: (PROMPT + t, 1)}, [request]) for t in range(tokens - 1)]
        return [note[request] for note in notes if request in note]


def told(window: Any = "all", alpha: float = 0.05, stop: bool = False, fail: str = "open") -> dict[str, Any]:
    return {FIELD: {"window": window, "alpha": alpha, "stop": stop, "fail": fail}}


def test_a_clean_request_is_judged_at_its_checkpoints_and_then_left_alone(profile: Path) -> None:
    worker = Worker()
    worker.probe.set_profile("", str(profile), None)
    worker.probe.open("r", None, PROMPT, told(window=2, alpha=0.02))
    notes = worker.answer("r", 6)
    assert [note["verdict"]["step"] for note in notes] == [0, 1, 2]
    assert notes[-1]["verdict"]["final"]
    assert [note["verdict"]["status"] for note in notes] == ["clean"] * 3
    expected = [(layer, PROMPT + t) for layer in range(LAYERS) for t in range(1 - PROMPT_ROWS, 3)]
    assert sorted(worker.observed) == expected


def test_heads_pulled_together_are_flagged_before_the_first_token_leaves(profile: Path) -> None:
    worker = Worker(together=0.6)
    worker.probe.set_profile("", str(profile), None)
    worker.probe.open("r", None, PROMPT, told(window="prefill", stop=True))
    (note,) = worker.answer("r", 1)
    assert note["verdict"]["status"] == "flagged"
    assert note["stop"]


def test_chunks_of_a_prompt_and_a_second_computing_of_it_count_no_row_twice(profile: Path) -> None:
    worker = Worker()
    worker.probe.set_profile("", str(profile), None)
    worker.probe.open("r", None, PROMPT, told(window=8, alpha=0.02))
    steps = [(0, 20, False), (20, 24, False), (44, 5, False), (49, 1, True), (50, 1, True), (51, 1, True)]
    # Preempted: prompt and three tokens are computed again in two chunks, the last of which samples the fourth.
    steps += [(0, 30, False), (30, 23, True), (53, 1, True)]
    for before, tokens, ready in steps:
        worker.step({"r": (before, tokens)}, ["r"] if ready else [])
    seen = [kv_len for layer, kv_len in worker.observed if layer == 0]
    assert sorted(seen) == list(range(PROMPT + 1 - PROMPT_ROWS, PROMPT + 5))
    assert worker.probe.status()["planned_rows"] == worker.probe.status()["seen_rows"] == len(seen)


def test_a_position_that_went_by_unseen_leaves_the_request_unscored(profile: Path) -> None:
    worker = Worker()
    worker.probe.set_profile("", str(profile), None)
    worker.probe.open("r", None, PROMPT, told(window=2, alpha=0.02))
    worker.step({"r": (0, PROMPT)}, ["r"])
    note = worker.step({"r": (PROMPT + 1, 1)}, ["r"])["r"]
    assert (note["verdict"]["status"], note["verdict"]["reason"]) == ("unscored", "probe_blind")


def test_a_probe_that_looks_away_is_blind_and_says_so(profile: Path) -> None:
    worker = Worker()
    worker.probe.set_profile("", str(profile), None)
    worker.probe.attach(False)
    worker.probe.open("r", None, PROMPT, told(fail="closed"))
    (note,) = worker.answer("r", 1)
    assert (note["verdict"]["reason"], note["stop"]) == ("probe_blind", True)
    status = worker.probe.status()
    assert not status["attached"]
    assert status["planned_rows"] > status["seen_rows"]
    assert status["blind"] == 1
    worker.probe.attach(True)
    assert worker.probe.status()["planned_rows"] == worker.probe.status()["seen_rows"] == 0


@pytest.mark.parametrize("where", ["look", "finish"])
def test_a_kernel_that_fails_blinds_the_guard_and_not_the_engine(profile: Path, where: str) -> None:
    worker = Worker()
    worker.probe.set_profile("", str(profile), None)
    worker.broken = where
    worker.probe.open("r", None, PROMPT, told())
    (note,) = worker.answer("r", 1)
    assert note["verdict"]["reason"] == "probe_blind"
    assert not worker.probe.status()["attached"]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (told(), "no_profile"),
        ({FIELD: {"window": "later"}}, "watch_not_supported"),
        ({FIELD: "{"}, "watch_not_supported"),
    ],
)
def test_what_cannot_be_watched_is_unscored_at_its_first_token(extra: dict[str, Any], reason: str) -> None:
    worker = Worker()
    worker.probe.open("r", None, PROMPT, extra)
    assert worker.step({"r": (0, 20)}, []) == {}
    note = worker.step({"r": (20, 30)}, ["r"])["r"]
    assert (note["verdict"]["status"], note["verdict"]["reason"]) == ("unscored", reason)


def test_a_watch_its_profile_cannot_keep_is_unscored_not_clean(profile: Path) -> None:
    worker = Worker()
    worker.probe.set_profile("", str(profile), None)
    worker.probe.open("r", None, PROMPT, told(alpha=1e-6))
    (note,) = worker.answer("r", 1)
    assert note["verdict"]["reason"] == "watch_not_supported"


def test_without_a_watch_of_its_own_a_request_is_guarded_by_the_engines_default(profile: Path) -> None:
    worker = Worker(default=Watch(fail_closed=True))
    worker.probe.open("r", "lora", PROMPT, None)
    (note,) = worker.answer("r", 1)
    assert (note["verdict"]["reason"], note["stop"]) == ("no_profile", True)
    assert worker.probe.status()["in_flight"] == {"lora": 1}
    worker.probe.close("r")
    assert worker.probe.status()["in_flight"] == {}


def test_slots_come_back_and_a_request_without_one_is_unscored(profile: Path) -> None:
    worker = Worker(requests=1)
    worker.probe.set_profile("", str(profile), None)
    for name in ("a", "b", "c"):  # two slots for one row: a preempted request keeps its own
        worker.probe.open(name, None, PROMPT, told())
    assert worker.step({"c": (0, PROMPT)}, ["c"])["c"]["verdict"]["reason"] == "no_slot"
    worker.probe.close("a")
    worker.probe.open("d", None, PROMPT, told(alpha=0.02))
    assert worker.step({"d": (0, PROMPT)}, ["d"])["d"]["verdict"]["status"] == "clean"


def test_a_profile_that_changed_on_its_way_is_refused(profile: Path) -> None:
    worker = Worker()
    with pytest.raises(ProfileMismatch, match="changed"):
        worker.probe.set_profile("", str(profile), "0" * 64)
    worker.probe.set_profile("lora", str(profile), Profile.load(profile).digest)
    assert list(worker.probe.status()["profiles"]) == ["lora"]
