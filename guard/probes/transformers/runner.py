"""The runner: batched prefill and decode over slots, with the probe looking on.

A slot is one running request: its keys and values, its row in the bank of head Grams, its length. The runner computes
logits and rows for any set of slots, each with its own adapter revision; which requests run, what is sampled and what
it means is decided above it. After `prefill` the bank holds the row of the last prompt position (step 0); each
`decode` adds the row of the token it was fed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from guard.errors import GuardError, PromptTooLong, UnsupportedModel
from guard.gram import PROMPT_GROUPS, PROMPT_KEY, HeadGrams, prompt_positions
from guard.probes.transformers.attention import PLAN, Plan, attach
from guard.probes.transformers.revisions import Revisions
from guard.probes.transformers.slots import SlotCache

# Part of every profile's key: raise it when the numbers the probe reports change meaning.
PROBE_VERSION = 1
# Without a wish from the caller, a context no longer than this: keys and values are preallocated for every slot.
_DEFAULT_MAX_LEN = 2048


class Runner:
    """Runs up to `max_slots` requests of up to `max_len` tokens over one base model and its adapter revisions.

    `chunk`: prompts longer than this many tokens are prefilled in pieces (bounds memory; changes no result).
    `probe=False` runs without looking; the logits are bit for bit the same.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_slots: int = 16,
        max_len: int | None = None,
        chunk: int | None = None,
        probe: bool = True,
        base_dir: Path | None = None,
    ) -> None:
        model.eval()
        model.requires_grad_(False)
        config: Any = model.config
        limit = int(getattr(config, "max_position_embeddings", 0) or _DEFAULT_MAX_LEN)
        self.max_len = min(limit, _DEFAULT_MAX_LEN) if max_len is None else max_len
        if self.max_len > limit:
            raise UnsupportedModel(f"max_len {self.max_len} is longer than the {limit} positions of the model.")
        self.tokenizer = tokenizer
        self.max_slots, self.chunk, self.probe = max_slots, chunk, probe
        self.shape = attach(model, self.max_len)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.vocab_size = int(config.vocab_size)
        self.eos_ids = _eos_ids(model, tokenizer)
        shape = self.shape
        self.bank = HeadGrams(
            max_slots, shape.layers, shape.heads, self.max_len, self.device, PROMPT_GROUPS, shape.kv_heads
        )
        self._cache = SlotCache(self.shape, max_slots, self.max_len, self.dtype, self.device)
        self._revisions = Revisions(model, base_dir)

    @classmethod
    def load(
        cls,
        base_dir: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        max_slots: int = 16,
        max_len: int | None = None,
        chunk: int | None = None,
        probe: bool = True,
    ) -> Runner:
        """A runner over the model and tokenizer in a local folder (safetensors only, no remote code)."""
        base_dir = Path(base_dir)
        if not (base_dir / "config.json").is_file():
            raise UnsupportedModel(f"{base_dir} is not a model folder: config.json is missing.")
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(base_dir),
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(str(base_dir), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise UnsupportedModel(
                f"{base_dir} cannot be loaded: expected config.json, *.safetensors weights and a tokenizer. {error}"
            ) from error
        return cls(model.to(device), tokenizer, max_slots, max_len, chunk, probe, base_dir)

    def probe_key(self) -> dict[str, int | str]:
        """What a profile must agree on to be used with this probe's numbers."""
        return {
            "kernel": "reference",
            "version": PROBE_VERSION,
            "attention": "sdpa",
            "layers": self.shape.layers,
            "heads": self.shape.heads,
            "kv_heads": self.shape.kv_heads,
            "prompt_rows": PROMPT_KEY,
        }

    # Adapter revisions -----------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Revisions now loaded."""
        return self._revisions.names

    def add_adapter(self, revision: str, folder: str | Path, inspected: bool = False) -> None:
        """Loads a PEFT LoRA folder under a revision name. Raises AdapterRejected; the model is then as before.

        inspected: `guard.adapters.inspect_adapter` has already passed this folder (it reads every weight of the base).
        """
        self._revisions.add(revision, folder, inspected)

    def remove_adapter(self, revision: str) -> None:
        """Unloads a revision. The caller makes sure that no slot still runs it."""
        self._revisions.remove(revision)

    # Running ---------------------------------------------------------------------------------------------------------

    def length(self, slot: int) -> int:
        """Tokens whose keys the slot holds."""
        return self._cache.lengths[slot]

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises PromptTooLong or GuardError for a prompt that cannot be run."""
        if not prompt:
            raise GuardError("the prompt has no tokens: nothing to continue. Send at least one token (BOS will do).")
        if len(prompt) > self.max_len:
            raise PromptTooLong(f"the prompt has {len(prompt)} tokens; this model runs at most {self.max_len}.")
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise GuardError(f"the prompt has token ids outside this model's vocabulary, 0..{self.vocab_size - 1}.")

    @torch.inference_mode()
    def prefill(
        self,
        slots: Sequence[int],
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str | None] | None = None,
        observe: Sequence[bool] | None = None,
    ) -> Tensor:
        """Runs whole prompts in free slots. Returns logits [N, V] float32 at each prompt's last position.

        adapters: revision of each row (None: the base); observe: rows the probe looks at (default: all).
        """
        for prompt in prompts:
            self.check_prompt(prompt)
        for slot in slots:
            self._cache.clear(slot)
        self.bank.reset(slots, [len(p) for p in prompts])
        names: list[str | None] = list(adapters or [None] * len(slots))
        logits = torch.zeros(len(slots), self.vocab_size, dtype=torch.float32, device=self.device)
        longest = max(len(p) for p in prompts)
        step = self.chunk or longest
        for start in range(0, longest, step):
            alive = [i for i, p in enumerate(prompts) if len(p) > start]
            pieces = [list(prompts[i][start : start + step]) for i in alive]
            width = max(len(piece) for piece in pieces)
            ids = torch.tensor([piece + [piece[-1]] * (width - len(piece)) for piece in pieces], device=self.device)
            ends = [start + len(piece) for piece in pieces]
            done = [n for n, i in enumerate(alive) if ends[n] == len(prompts[i])]
            last = [ends[n] - 1 - start for n in range(len(alive))]
            watched = [n for n, i in enumerate(alive) if observe is None or observe[i]]
            looks = {
                n: [
                    (position - start, self.bank.place(slots[alive[n]], back))
                    for back, position in enumerate(prompt_positions(len(prompts[alive[n]])))
                    if start <= position < ends[n]
                ]
                for n in watched
            }
            out = self._forward(
                [slots[i] for i in alive],
                [start] * len(alive),
                ids,
                [names[i] for i in alive],
                looks,
                [len(prompts[i]) for i in alive],
                [(n, last[n]) for n in done],
            )
            for n, i in enumerate(alive):
                self._cache.lengths[slots[i]] = ends[n]
            logits[[alive[n] for n in done]] = out
        return logits

    @torch.inference_mode()
    def decode(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        adapters: Sequence[str | None] | None = None,
        observe: Sequence[bool] | None = None,
    ) -> Tensor:
        """Feeds one token to each slot. Returns logits [N, V] float32 for the token after it. Arguments as
        `prefill`.
        """
        starts = [self._cache.lengths[slot] for slot in slots]
        for slot, start in zip(slots, starts, strict=True):
            if start >= self.max_len:
                raise PromptTooLong(f"slot {slot} already holds {start} tokens, all that this model runs.")
        ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
        names: list[str | None] = list(adapters or [None] * len(slots))
        looks = {n: [(0, slot)] for n, slot in enumerate(slots) if observe is None or observe[n]}
        prompt = [self.bank.prompt_tokens(slot) for slot in slots]
        logits = self._forward(slots, starts, ids, names, looks, prompt, [(n, 0) for n in range(len(slots))])
        for slot, start in zip(slots, starts, strict=True):
            self._cache.lengths[slot] = start + 1
        return logits

    def free(self, slot: int) -> None:
        """Forgets what a slot held."""
        self._cache.clear(slot)
        self.bank.reset([slot])

    def _forward(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        ids: Tensor,
        adapters: list[str | None],
        looks: Mapping[int, Sequence[tuple[int, int]]],
        prompt_len: list[int],
        wanted: list[tuple[int, int]],
    ) -> Tensor:
        """One model call. ids [N, T_q]; row n's queries are positions starts[n] .. starts[n] + T_q - 1.

        `looks` are, by row, the index of each query that the probe takes and its place in the bank. `wanted` name a row
        and the index of one of its queries: the logits there are returned, as [len(wanted), V] float32.
        """
        device, wide = self.device, ids.shape[1]
        columns = max(starts) + wide
        start = torch.tensor(starts, device=device)
        positions = start[:, None] + torch.arange(wide, device=device)
        mask = torch.arange(columns, device=device) <= positions[:, :, None]
        kept = sorted({query for _, query in wanted}) or [wide - 1]
        self._revisions.select(adapters)
        seen = {n: queries for n, queries in looks.items() if queries}
        extra: dict[str, Any] = {PLAN: self._plan(starts, seen, prompt_len)} if self.probe and seen else {}
        logits = self._revisions.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask[:, None],
            past_key_values=self._cache.view(slots, starts, columns),
            use_cache=True,
            logits_to_keep=torch.tensor(kept, device=device),
            **extra,
        ).logits
        return logits[[n for n, _ in wanted], [kept.index(query) for _, query in wanted]].float()

    def _plan(
        self, starts: Sequence[int], looks: Mapping[int, Sequence[tuple[int, int]]], prompt_len: list[int]
    ) -> Plan:
        rows, queries = list(looks), list(looks.values())
        most = max(map(len, queries))
        whole = all(len(own) == most for own in queries)

        def tensor(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        query = tensor([[index for index, _ in own] + [0] * (most - len(own)) for own in queries])
        live = [number * most + i for number, own in enumerate(queries) for i in range(len(own))]
        return Plan(
            bank=self.bank,
            rows=None if rows == list(range(len(starts))) else tensor(rows),
            query=query,
            kv_len=query + tensor([[starts[n] + 1] for n in rows]),
            live=None if whole else tensor(live),
            places=tensor([place for own in queries for _, place in own]),
            prompt_len=tensor([prompt_len[n] for n in rows]),
            width=max(prompt_len[n] for n in rows),
        )


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids that end an answer: the generation configuration's, and the tokenizer's."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)
