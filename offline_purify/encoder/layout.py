"""Where each attention head lives in a BERT-shaped encoder: rows of query, key and value (weights and biases), columns
of attention.output.dense.

Every query head has its own key and value head. The output projection's bias is shared by all heads: no head may claim
it.

Shapes: L layers, H heads, D head size; hidden size = H * D.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from offline_purify.heads.layout import HeadLayout

_SLICED = re.compile(r"\.layer\.(\d+)\.attention\.(?:self\.(query|key|value)\.(?:weight|bias)|output\.dense\.weight)$")


class EncoderLayout(HeadLayout):
    """L layers of H heads of size D."""

    @classmethod
    def of(cls, layers: int, heads: int, head_dim: int) -> EncoderLayout:
        """With as many key/value heads as query heads."""
        return cls(layers, heads, heads, head_dim)

    def masks(
        self, parameters: Mapping[str, nn.Parameter], q_values: Tensor, kv_values: Tensor, projections: str = "qkvo"
    ) -> dict[str, Tensor]:
        """Value of the owning head for every element that one head owns, by parameter name.

        ``q_values`` [L, H] apply to query and output, ``kv_values`` [L, H] to key and value; only the letters in
        ``projections``. Each mask has its parameter's shape and dtype; parameters that no single head owns are absent.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            match = _SLICED.search(name)
            letter = (match[2] or "output")[0] if match is not None else ""
            if match is None or letter not in projections:
                continue
            values = (q_values if letter in "qo" else kv_values)[int(match[1])]
            line = values.to(parameter.dtype).to(parameter.device).repeat_interleave(self.head_dim)
            shaped = line if parameter.dim() == 1 else line[None, :] if letter == "o" else line[:, None]
            found[name] = shaped.expand_as(parameter).clone()
        return found
