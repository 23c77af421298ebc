"""Tokens that are neither explained nor credited.

Invariant: whether a token is skipped depends on its own text alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The list of the paper authors' implementation: comma, full stop and blanks.
_PUNCTUATION = frozenset({"", ",", "."})


def skip_mask(token_texts: Sequence[str], rule: str | Sequence[str]) -> Tensor | None:
    """Marks skipped tokens.

    Args:
        token_texts: Text of each token.
        rule: ``"none"``, ``"punctuation"``, or strings; a token whose text without surrounding
            blanks equals one of them, itself without surrounding blanks, is skipped.

    Returns:
        bool ``[N]``, or None when the rule is ``"none"``.
    """
    if rule == "none":
        return None
    skipped = _PUNCTUATION if rule == "punctuation" else {text.strip() for text in rule}
    return torch.tensor([text.strip() in skipped for text in token_texts], dtype=torch.bool)
