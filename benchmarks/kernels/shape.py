"""Shapes of models, and what one decode step of them must move and compute: arithmetic only, no clock.

Legend: R requests in a batch, T keys per request (all of them prompt), L layers, H query heads, H_kv key heads, D head
size. A decode step reads every linear weight once and every key and value of the batch once; a probe of every token
reads the keys again.
"""

from __future__ import annotations

from dataclasses import dataclass

from guard.gram import PROMPT_ROWS

# Of a decode step, for every token: the goal of the guard on a GPU.
GOAL = 0.02
ANSWER_TOKENS = 256  # over which a window's cost is spread


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: sizes in elements."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's projections."""
        attention = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.head_size
        return attention + 3 * self.hidden * self.mlp

    @property
    def weights(self) -> int:
        """Elements a decode step reads: all layers and the output head."""
        return self.layers * self.layer_weights + self.vocabulary * self.hidden


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 2, 64, 4, 2, 32, 128, 256),
        Shape("0.2b", 16, 1024, 16, 8, 64, 2816, 32000),
        Shape("8b", 32, 4096, 32, 8, 128, 14336, 128256),
    )
}


def arithmetic(shape: Shape, rows: int, keys: int, passes: int, bytes_per_s: float, element_bytes: int = 2) -> dict:
    """Bytes and operations of a decode step and of a probe of each of its tokens, and the probe's share.

    `passes`: how often the probe reads a key (CPU kernel 1; GPU kernel 2, for softmax statistics and for weights).
    """
    one_side = rows * keys * shape.layers * shape.kv_heads * shape.head_size * element_bytes
    weights = shape.weights * element_bytes
    step = weights + 2 * one_side
    state = 2 * 4 * rows * shape.layers * shape.heads**2  # Grams are read and written
    probe = passes * one_side + state
    scores = 2 * rows * keys * shape.layers * shape.heads * shape.head_size
    gram = 2 * rows * keys * shape.layers * shape.heads**2
    share = probe / step
    return {
        "shape": shape.name,
        "rows": rows,
        "keys": keys,
        "step_bytes": step,
        "step_weight_bytes": weights,
        "step_kv_bytes": 2 * one_side,
        "probe_bytes": probe,
        "probe_key_bytes": passes * one_side,
        "probe_operations": passes * scores + gram,
        "step_operations": 2 * rows * shape.weights + 2 * scores,
        "step_ms_at_bandwidth": step / bytes_per_s * 1e3,
        "probe_ms_at_bandwidth": probe / bytes_per_s * 1e3,
        "share_of_step": share,
        "keys_share_of_probe": passes * one_side / probe,
        "share_without_reading_keys_again": state / step,
        "share_by_window": {
            "prefill": share * PROMPT_ROWS / ANSWER_TOKENS,
            "16": share * (PROMPT_ROWS + 16) / ANSWER_TOKENS,
            "all": share,
        },
        "goal_met": share <= GOAL,
    }
