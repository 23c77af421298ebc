"""How an attention layer turns queries and keys into attention weights.

Invariant: whatever a layer does to its logits is either here or the layer is not traced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionForm:
    """Logits of query ``i`` and key ``j <= i`` of head ``h``, and what is normalised over.

    With ``z = scale * q_ih . k_j``, the logit is ``soft_cap * tanh(z / soft_cap)`` if there is a
    cap and ``z`` otherwise, plus ``alibi_slopes[h] * (j - i)``. Keys further back than the window
    are not seen. A sink is one more logit in the denominator that belongs to no token.

    Attributes:
        scale: Positive factor on the dot products.
        sliding_window: Query ``i`` sees keys ``i - sliding_window < j <= i``; None sees all.
        soft_cap: Largest absolute logit; 0 for no cap.
        alibi_slopes: float32 ``[H]``, or None.
        sinks: float32 ``[H]``, or None.

    Raises:
        ValueError: A number is out of its range.
    """

    scale: float
    sliding_window: int | None = None
    soft_cap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")
        if not 0 <= self.soft_cap < math.inf:
            raise ValueError(f"soft_cap must not be negative, got {self.soft_cap}")

    @property
    def is_plain(self) -> bool:
        """Whether it is a causal softmax of scaled dot products and nothing else."""
        return (
            self.sliding_window is None
            and self.soft_cap == 0
            and self.alibi_slopes is None
            and self.sinks is None
        )

    def first_visible(self, position: int) -> int:
        """The first key that a query sees."""
        return 0 if self.sliding_window is None else max(0, position - self.sliding_window + 1)
