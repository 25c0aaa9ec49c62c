"""One worker's probe: it plans the rows of a step, looks at them layer by layer, and turns readings into notes.

    opened (prompt known) ─► plan (batch order final) ─► look (after each layer's attention) ─► finish (after the
    last) ─► judge (token sampled)

The plan is made from the model runner's own books, never from the metadata of an attention backend: it holds the
queries of each request that are to be observed and were not yet: of a prompt the last few, then one per generated
token. Requests that need no more reading cost nothing.
Whatever goes wrong in here makes requests `unscored`; it never takes the engine down, and the worker's status tells.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from guard.errors import GuardError, ProfileMismatch
from guard.gram import PROMPT_GROUPS, PROMPT_KEY, HeadGrams, HeadSums, prompt_positions
from guard.kernels.paged import PagedRows
from guard.probes.vllm.norms import Norms
from guard.probes.vllm.requests import Note, Watched, note
from guard.probes.vllm.support import Layer
from guard.profile import Profile
from guard.verdict import unscored
from guard.watch import DEFAULT_ALPHA, Watch, Watcher

log = logging.getLogger(__name__)

PROBE_VERSION = 1
FIELD = "headguard"
"""Key of a request's watch among its sampling parameters' extra arguments."""


class Reader(Protocol):
    """A kernel with its scratch, bound to a bank: `guard.kernels.cpu.Reader` or `guard.kernels.triton.Reader`."""

    def look(self, rows: PagedRows, layer: int, query: Tensor, kv_cache: Tensor, scaling: float) -> None:
        """After a layer's attention: query [T, H, D] post-rotary, kv_cache the layer's paged cache."""

    def finish(self) -> None:
        """After the forward's last layer: from now on the bank holds what the rows add."""


def _paged(picked: Sequence[tuple[int, int, int, int, int]], blocks: np.ndarray | Tensor) -> PagedRows:
    """The plan as the kernels take it, where the block table lies: numpy on a CPU, else on its device.

    picked: batch row, query, slot, kv_len and prompt_len of each row."""
    columns = np.ascontiguousarray(np.asarray(picked, np.int32).T)
    if isinstance(blocks, np.ndarray):
        index, query, slot, kv_len, prompt_len = columns
        return PagedRows(query, slot, kv_len, prompt_len, np.ascontiguousarray(blocks[index], np.int32))
    where, *told = torch.from_numpy(columns).to(blocks.device, non_blocking=True)
    return PagedRows(told[0], told[1], told[2], told[3], blocks.index_select(0, where))


class Probe:
    """Watches the requests of one worker. All calls come from the worker's own thread.

    layers: from `support.attention_layers`; reader: makes one for a bank; max_requests: rows a batch can have
    (preempted requests keep their slots, so there are twice as many); default: the watch of requests that carry none.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        reader: Callable[[HeadGrams], Reader],
        max_requests: int,
        max_len: int,
        default: Watch,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers, self._default = list(layers), default
        self.heads = layers[0].heads
        self.kv_heads = layers[0].kv_heads
        self.bank = HeadGrams(2 * max_requests, len(layers), self.heads, max_len, device, PROMPT_GROUPS, self.kv_heads)
        self._reader, self._norms = reader(self.bank), Norms(self.bank)
        self.attached = True
        self.forwards = self.planned = self.seen = self.blind = 0
        self._free = list(range(2 * max_requests))[::-1]
        self._watched: dict[str, Watched] = {}
        self._silent: dict[str, Note] = {}
        self._rows: PagedRows | None = None
        self._stepping: list[tuple[str, int]] = []
        self._chances: Tensor | None = None
        self._watchers: dict[str, Watcher] = {}
        self._held: Counter[str] = Counter()
        self._holders: dict[str, str] = {}
        self.recorded: dict[int, list[tuple[int, HeadSums, tuple[float, ...]]]] | None = None
        self._record_steps: tuple[int, ...] = ()

    # Control ---------------------------------------------------------------------------------------------------------

    def key(self) -> dict[str, int | str]:
        """What a profile must agree on to be used with this probe's numbers."""
        return {
            "kernel": "paged", "version": PROBE_VERSION, "layers": len(self.layers), "heads": self.heads,
            "kv_heads": self.kv_heads, "prompt_rows": PROMPT_KEY,
        }  # fmt: skip

    def set_profile(self, revision: str, path: str | None, digest: str | None) -> None:
        """Watch a revision ("": the base) by the profile in a file, or no more. Requests under way keep theirs.

        Raises ProfileMismatch when the file is not the one that was checked (digest, 64 hex).
        """
        if path is None:
            self._watchers.pop(revision, None)
            return
        profile = Profile.load(Path(path))
        if digest is not None and profile.digest != digest:
            raise ProfileMismatch(f"the profile of {revision or 'the base'} changed on its way to the worker.")
        self._watchers[revision] = Watcher(profile)

    def attach(self, attached: bool) -> None:
        """Look, or (a drill) look away. Counters start anew when the probe looks again."""
        self.attached = attached
        if attached:
            self.forwards = self.planned = self.seen = 0

    def record(self, steps: Sequence[int] | None) -> None:
        """Keep the sums at `steps` of every request whose watch asks for it, in `recorded`; None: stop."""
        self._record_steps = tuple(sorted(steps or ()))
        self.recorded = {} if steps else None

    def status(self) -> dict[str, Any]:
        """Counters and profiles, as `headguard_status` tells them."""
        return {
            "attached": self.attached,
            "layers": len(self.layers),
            "heads": self.heads,
            "key": self.key(),
            "forwards": self.forwards,
            "planned_rows": self.planned,
            "seen_rows": self.seen // len(self.layers),
            "blind": self.blind,
            "slots": len(self._free),
            "in_flight": {name: count for name, count in self._held.items() if count},
            "profiles": {name: watcher.profile.digest for name, watcher in self._watchers.items()},
        }

    # A request's way -------------------------------------------------------------------------------------------------

    def open(self, request_id: str, revision: str | None, prompt_tokens: int, extra: Mapping[str, Any] | None) -> None:
        """A request has come; `extra` are its sampling parameters' extra arguments."""
        self.close(request_id)
        name = revision or ""
        self._held[name] += 1
        self._holders[request_id] = name
        told = (extra or {}).get(FIELD)
        record = told.get("record") if isinstance(told, Mapping) else None
        if record is not None and self.recorded is not None:
            self._enter(request_id, Watched(revision, prompt_tokens, -1, Watch(), self._record_steps, record=record))
            return
        watch = self._default
        try:
            watch = Watch.parse(told) if told is not None else self._default
            watcher = self._watchers.get(name)
            if watcher is None:
                self._say(request_id, "no_profile", watch)
                return
            detector = watcher.detector(watch)
        except (GuardError, ValueError):
            self._say(request_id, "watch_not_supported", watch)
            return
        track = detector.open(prompt_tokens)
        if track.bucket is None:
            self._silent[request_id] = note(track.verdict, watch)
            return
        self._enter(request_id, Watched(revision, prompt_tokens, -1, watch, detector.checkpoints, detector, track))

    def knows(self, request_id: str) -> bool:
        """Whether a request has been opened and not yet closed, watched or not."""
        return request_id in self._holders

    def close(self, request_id: str) -> None:
        """A request is over, for whatever reason."""
        if (name := self._holders.pop(request_id, None)) is not None:
            self._held[name] -= 1
        self._silent.pop(request_id, None)
        self._leave(request_id)

    def _say(self, request_id: str, reason: str, watch: Watch) -> None:
        alpha = DEFAULT_ALPHA if watch.alpha is None else watch.alpha
        self._silent[request_id] = note(unscored(reason, alpha=alpha, window=watch.window), watch)

    def _enter(self, request_id: str, watched: Watched) -> None:
        if not self._free:
            self._say(request_id, "no_slot", watched.watch)
            return
        watched.slot = self._free.pop()
        self.bank.reset([watched.slot], [watched.prompt_tokens])
        self._watched[request_id] = watched

    def _leave(self, request_id: str) -> None:
        if (watched := self._watched.pop(request_id, None)) is not None:
            self._free.append(watched.slot)

    # One step --------------------------------------------------------------------------------------------------------

    def plan(
        self, rows: Mapping[str, int], computed: np.ndarray, starts: np.ndarray, blocks: np.ndarray | Tensor
    ) -> None:
        """Before a forward: which queries to look at.

        rows: request to batch row; computed int [R]: tokens computed before this step; starts int [R + 1]: where each
        row's queries begin; blocks int32 [R, M]: block table.
        """
        self.forwards += 1
        stepping: list[tuple[str, int]] = []
        picked: list[tuple[int, int, int, int, int]] = []
        for request_id, watched in self._watched.items():
            row = rows.get(request_id)
            if row is None:
                continue
            first, begin = int(computed[row]), int(starts[row])
            end = first + int(starts[row + 1]) - begin
            if end <= watched.next_position:
                continue
            if first > watched.next_position:  # a position went by that was never observed
                watched.lost = True
                watched.next_position = end - 1
            tokens = watched.prompt_tokens
            places = [(position, watched.slot) for position in range(max(tokens, watched.next_position), end)]
            if watched.next_position < tokens:
                # In order, so that rows that share a place stand next to each other, as the kernels need them.
                places += [
                    (position, self.bank.place(watched.slot, back))
                    for back, position in enumerate(prompt_positions(tokens))
                    if watched.next_position <= position < end
                ]
            picked += [(row, begin + position - first, place, position + 1, tokens) for position, place in places]
            watched.next_position = end
            if end >= tokens:
                stepping.append((request_id, row))
        self._stepping = stepping
        self._rows = None
        if picked:
            self.planned += len(picked)
            self._rows = _paged(picked, blocks)

    def look(self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, kv_cache: Tensor) -> None:
        """After a layer's attention: query [T, H, D] and key [T, H_kv, D] post-rotary, value [T, H_kv, D], output
        [T, H, D], kv_cache the layer's paged cache."""
        if self._rows is None or not self.attached:
            return
        try:
            self._reader.look(self._rows, layer, query, kv_cache, self.layers[layer].scaling)
            self._norms.look(self._rows, query, key, value, output)
        except Exception as error:
            self._fail(f"in layer {layer}", error)
            return
        self.seen += len(self._rows.slot)

    def _fail(self, where: str, error: Exception) -> None:
        # The message may quote data; the kind of error and the place never do.
        log.error("headguard's probe failed %s (%s): it is detached.", where, type(error).__name__)
        self.attached = False

    def before_sampling(self, logits: Tensor) -> None:
        """The forward is over: have its rows read, and keep their log-probabilities, since sampling may change logits
        [R, V] in place."""
        if self._rows is not None and self.attached:
            try:
                self._reader.finish()
                self._norms.finish()
            except Exception as error:
                self._fail("after the last layer", error)
        self._rows = None
        self._chances = None
        if self._stepping:
            index = torch.tensor([row for _, row in self._stepping], device=logits.device)
            self._chances = logits.index_select(0, index).float().log_softmax(dim=-1)

    def after_sampling(self, rows: Mapping[str, int], sampled: Sequence[Sequence[int]]) -> dict[str, dict[str, Any]]:
        """The notes of this step, by request. sampled: the tokens of each row, none where the prompt goes on."""
        notes: dict[str, Note] = {}
        chances, self._chances = self._chances, None
        stepping, self._stepping = self._stepping, []
        if stepping and chances is not None:
            tokens = torch.tensor([sampled[row][0] if sampled[row] else 0 for _, row in stepping])
            drawn = chances.gather(1, tokens.to(chances.device)[:, None])[:, 0].tolist()
            for (request_id, _), logprob in zip(stepping, drawn, strict=True):
                watched = self._watched.get(request_id)
                if watched is not None:
                    watched.logprobs.append(logprob)
                    self._read(request_id, watched, notes)
        for request_id in [r for r in self._silent if r in rows and sampled[rows[r]]]:
            notes[request_id] = self._silent.pop(request_id)
        return {request_id: told.to_dict() for request_id, told in notes.items()}

    def _read(self, request_id: str, watched: Watched, notes: dict[str, Note]) -> None:
        step = watched.step
        if step in watched.steps:
            complete = self.attached and self.bank.complete(watched.slot, step + 1)
            sums = self.bank.read(watched.slot, step).cpu()
            if watched.record is not None:
                assert self.recorded is not None
                if complete and not watched.lost:
                    read = (step, sums, tuple(watched.logprobs))
                    self.recorded.setdefault(watched.record, []).append(read)
            else:
                notes[request_id] = told = watched.judge(sums, complete)
                self.blind += told.verdict.reason == "probe_blind"
                if told.verdict.final:
                    self._leave(request_id)
                    return
        if watched.over:
            self._leave(request_id)
