"""The lab's decoder in training dress: the arithmetic of a Llama, arranged for a CPU that has two minutes.

Exactly `LlamaForCausalLM` (RMS norm, rotary positions, grouped-query attention, SwiGLU, tied embeddings), but the
layers' weights are stacked, projections that share an input are one product, and logits are formed only where an
answer is predicted. That is several times quicker than the general implementation on sequences of thirty tokens.
`llama_state` hands the weights over under their ordinary names; a test compares the logits of the two.

Shapes: B rows, T tokens, d hidden size, H query heads, H_kv key heads, D head size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

EMBEDDING_STD = 0.25
MATCH = 3.0
"""Gain of the heads that look for equal tokens: self and equal tokens get about 0.4 of the attention each."""
FIRST_LAYER = ((1, 2), (1, 3))
"""For the first key heads of layer 0: how many tokens back each of their query heads looks."""
BACK, FREE = "look back", "free"
SAME, NEXT, BEFORE = (0, 0, 0), (0, 1, 0), (0, 0, 1)
ASKED_NEXT, ASKED_FACT = (3, 1, 0), (3, 2, 0)
LATER_LAYERS: tuple[tuple[str | tuple[int, int, int], ...], ...] = (
    (SAME, NEXT, ASKED_NEXT, ASKED_FACT),
    (BACK, NEXT, FREE, FREE),
    (BEFORE, NEXT, FREE, FREE),
)
"""For the key heads of layers 1, 2, 3: which token they look for (the one `query` places back), beside what it should
stand (`key` places after it), and what they copy (the token there, or the one before). Free heads start at random."""
INITIALISATION = (EMBEDDING_STD, MATCH, FIRST_LAYER, LATER_LAYERS)
"""What a cached model depends on."""


@dataclass(frozen=True)
class Shape:
    """Size of a decoder. `context` is the largest number of positions it is declared for."""

    vocab: int
    hidden: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 192
    head_size: int = 32
    context: int = 512
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [B, heads, T, D] with cos, sin [T, D] (sin already carries the sign of the half turn)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), -1) * sin


class Decoder(nn.Module):
    """A Llama-shaped decoder with stacked layers; float32."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = s = shape
        generator = torch.Generator().manual_seed(seed)

        def matrix(out: int, inner: int, gain: float = 1.0) -> nn.Parameter:
            weights = torch.randn(s.layers, out, inner, generator=generator) * (gain * inner**-0.5)
            return nn.Parameter(weights)

        wide, kv = s.heads * s.head_size, s.kv_heads * s.head_size
        self.embedding = nn.Parameter(torch.randn(s.vocab, s.hidden, generator=generator) * EMBEDDING_STD)
        self.query, self.key, self.value = matrix(wide, s.hidden), matrix(kv, s.hidden), matrix(kv, s.hidden)
        self.output = matrix(s.hidden, wide, 0.2 * EMBEDDING_STD)
        self.gate, self.up = matrix(s.ffn, s.hidden), matrix(s.ffn, s.hidden)
        self.down = matrix(s.hidden, s.ffn, 0.2 * EMBEDDING_STD)
        self.attention_norm = nn.Parameter(torch.ones(s.layers, s.hidden))
        self.ffn_norm = nn.Parameter(torch.ones(s.layers, s.hidden))
        self.final_norm = nn.Parameter(torch.ones(s.hidden) * 0.1 / EMBEDDING_STD)
        self._mimic(generator)
        angles = torch.outer(
            torch.arange(s.context, dtype=torch.float32),
            s.rope_theta ** -(torch.arange(0, s.head_size, 2, dtype=torch.float32) / s.head_size),
        )
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), -1), persistent=False)
        self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), -1), persistent=False)

    @torch.no_grad()
    def _mimic(self, generator: torch.Generator) -> None:
        """Start from heads that a trained decoder has anyway (mimetic initialisation, Trockman & Kolter, 2023).

        The first layer looks back by one, two and three tokens and writes what stood there beside each token; later
        layers look for the current token, where it stood before or what came after it there. Finding such
        heads by gradient takes most of a small model's training (0.7 of its steps here); all stay free to change.
        """
        s = self.shape
        self.embedding[:, 0] = 4 * EMBEDDING_STD  # alike for all tokens: what a head that looks at places reads
        group, size = s.heads // s.kv_heads, s.head_size
        shifts: dict[int, Tensor] = {}
        for kv, offsets in zip(range(s.kv_heads), FIRST_LAYER, strict=False):
            for member, offset in zip(range(group), offsets, strict=False):
                out = self._look_back(0, kv, member, offset, generator)
                written = out @ self.value[0, kv * size : (kv + 1) * size]
                shifts[offset] = shifts[offset] + written if offset in shifts else written
        for layer in range(1, s.layers):
            plan = LATER_LAYERS[(layer - 1) % len(LATER_LAYERS)]
            for kv in range(s.kv_heads):
                sought = plan[kv % len(plan)]
                if sought == BACK:
                    for member in range(group):
                        self._look_back(layer, kv, member, member + 1, generator)
                elif isinstance(sought, tuple):
                    asked, shifted, told = (shifts.get(offset) for offset in sought)
                    self._look_up(layer, kv, asked, shifted, told, generator)

    def _look_back(self, layer: int, kv: int, member: int, offset: int, generator: torch.Generator) -> Tensor:
        """Make one query head attend `offset` tokens back; returns its output map [d, D]."""
        s = self.shape
        half, start = s.head_size // 2, kv * s.head_size
        angle = offset * s.rope_theta ** -(torch.arange(half, dtype=torch.float32) / half)
        head = (kv * (s.heads // s.kv_heads) + member) * s.head_size
        # A query turned by -offset matches a key that stands `offset` places earlier, whatever the tokens are.
        self.key[layer, start : start + s.head_size] *= 0.1
        self.key[layer, start : start + half, 0] = 1.0
        self.query[layer, head : head + s.head_size] *= 0.1
        self.query[layer, head : head + half, 0] = angle.cos()
        self.query[layer, head + half : head + s.head_size, 0] = -angle.sin()
        out = torch.randn(s.hidden, s.head_size, generator=generator) * (2 * EMBEDDING_STD * s.hidden**-0.5)
        self.output[layer][:, head : head + s.head_size] = out
        return out

    def _look_up(
        self, layer: int, kv: int, asked: Tensor | None, shifted: Tensor | None, told: Tensor | None,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        """Make a group of heads attend to earlier places of a token and copy what is there.

        Each map [d, d] says where the token is written: the one looked for (`asked`) beside the present token, at the
        places to find it (`shifted`), and what is to be copied there (`told`); None is the token itself.
        """
        s = self.shape
        keys = slice(kv * s.head_size, (kv + 1) * s.head_size)
        half = s.head_size // 2
        slow = (s.rope_theta ** -(torch.arange(half, dtype=torch.float32) / half) < 0.06).float().repeat(2)
        probe = torch.randn(s.head_size, s.hidden, generator=generator) * s.hidden**-0.5 * slow[:, None] * MATCH
        probe[:, 0] = 0

        def read(weights: Tensor, written: Tensor | None) -> Tensor:
            """`weights` [D, d] applied to what a map wrote, at the same gain."""
            if written is None:
                return weights
            turned = weights @ written.T
            return turned * (weights.norm() / turned.norm())

        self.key[layer, keys] = read(probe, shifted) + 0.2 * self.key[layer, keys]
        for member in range(s.heads // s.kv_heads):
            head = (kv * (s.heads // s.kv_heads) + member) * s.head_size
            rows = slice(head, head + s.head_size)
            self.query[layer, rows] = read(probe, asked) + 0.2 * self.query[layer, rows]
            self.output[layer][:, rows] = 2 * EMBEDDING_STD * self.value[layer, keys].T
        self.value[layer, keys] = read(self.value[layer, keys].clone(), told)

    def matrices(self) -> list[nn.Parameter]:
        """The stacked weight matrices [L, out, in], which an optimiser for matrices may take."""
        return [self.query, self.key, self.value, self.output, self.gate, self.up, self.down]

    def others(self) -> list[nn.Parameter]:
        """The embedding and the norms."""
        return [self.embedding, self.attention_norm, self.ffn_norm, self.final_norm]

    def _attention(self, x: Tensor, layer: int, mask: Tensor) -> Tensor:
        s = self.shape
        batch, length, _ = x.shape
        weight = torch.cat((self.query[layer], self.key[layer], self.value[layer]))
        heads = functional.linear(x, weight).view(batch, length, -1, s.head_size).transpose(1, 2)
        cos, sin = self.cos[:length], self.sin[:length]
        turned = _rotate(heads[:, : s.heads + s.kv_heads], cos, sin)
        group = s.heads // s.kv_heads
        q = (turned[:, : s.heads] * s.head_size**-0.5).reshape(batch * s.kv_heads, group * length, s.head_size)
        k = turned[:, s.heads :].reshape(batch * s.kv_heads, length, s.head_size)
        v = heads[:, s.heads + s.kv_heads :].reshape(batch * s.kv_heads, length, s.head_size)
        scores = torch.bmm(q, k.transpose(1, 2)).view(-1, group, length, length) + mask
        rows = scores.softmax(-1).view(-1, group * length, length)
        mixed = torch.bmm(rows, v).view(batch, s.heads, length, s.head_size).transpose(1, 2)
        return functional.linear(mixed.reshape(batch, length, -1), self.output[layer])

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """Logits [n, V] float32 at `places` [n] (flat indices into B*T) for ids [B, T] int64, rows padded right."""
        s = self.shape
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf"), device=ids.device).triu(1)
        x = functional.embedding(ids, self.embedding)
        for layer in range(s.layers):
            x = x + self._attention(
                functional.rms_norm(x, (s.hidden,), self.attention_norm[layer], s.norm_eps), layer, mask
            )
            y = functional.rms_norm(x, (s.hidden,), self.ffn_norm[layer], s.norm_eps)
            gate, up = functional.linear(y, torch.cat((self.gate[layer], self.up[layer]))).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, self.down[layer])
        x = x.view(-1, s.hidden)[places]
        return functional.linear(functional.rms_norm(x, (s.hidden,), self.final_norm, s.norm_eps), self.embedding)

    def llama_state(self) -> dict[str, Tensor]:
        """The weights under the names of `LlamaForCausalLM` (without the tied `lm_head`), contiguous copies."""
        names = {
            "self_attn.q_proj": self.query, "self_attn.k_proj": self.key, "self_attn.v_proj": self.value,
            "self_attn.o_proj": self.output, "mlp.gate_proj": self.gate, "mlp.up_proj": self.up,
            "mlp.down_proj": self.down, "input_layernorm": self.attention_norm,
            "post_attention_layernorm": self.ffn_norm,
        }  # fmt: skip
        state = {
            f"model.layers.{layer}.{name}.weight": stacked[layer].detach().clone()
            for name, stacked in names.items()
            for layer in range(self.shape.layers)
        }
        state["model.embed_tokens.weight"] = self.embedding.detach().clone()
        state["model.norm.weight"] = self.final_norm.detach().clone()
        return state
