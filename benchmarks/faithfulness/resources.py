"""What families and metrics share: the engine, the Hugging Face model, the tokenizer.

Invariant: each is made when it is first asked for, at most once at a time, and can be let go of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Resources:
    """Shared and lazy; families get one of these.

    Attributes:
        model_path: Folder of the explained model.
        dtype: Of its weights and activations, e.g. ``"float32"``.
        seed: Of everything random.
        max_model_len: Tokens of the longest sequence.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str = "float32",
        seed: int = 0,
        max_model_len: int = 8192,
        response_scorer: Any | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            model_path: Folder of the explained model.
            dtype: Of its weights and activations.
            seed: Of everything random.
            max_model_len: Tokens of the longest sequence.
            response_scorer: Used for perturbations in the place of the engine's own.
        """
        self.model_path = str(model_path)
        self.dtype = dtype
        self.seed = seed
        self.max_model_len = max_model_len
        self._scorer = response_scorer
        self._engine: Any = None
        self._hf: Any = None
        self._tokenizer: Any = None

    @property
    def engine(self) -> Any:
        """The vLLM engine: ``.ft`` is a `FlashTrace`, ``.scorer`` a `ResponseScorer`."""
        if self._engine is None:
            from benchmarks.faithfulness.engine import EngineResource

            self._engine = EngineResource(
                self.model_path, dtype=self.dtype, max_model_len=self.max_model_len
            )
        return self._engine

    @property
    def scorer(self) -> Any:
        """Log-probabilities of responses, see `benchmarks.faithfulness.method.ResponseScorer`."""
        return self._scorer if self._scorer is not None else self.engine.scorer

    @property
    def hf(self) -> Any:
        """The model in Hugging Face transformers, see `benchmarks.faithfulness.hf.HFModel`."""
        if self._hf is None:
            import torch

            from benchmarks.faithfulness.hf import HFModel

            self._hf = HFModel(self.model_path, dtype=getattr(torch, self.dtype))
        return self._hf

    @property
    def tokenizer(self) -> Any:
        """The model's fast tokenizer, without its weights."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        return self._tokenizer

    def close_hf(self) -> None:
        """Lets go of the Hugging Face model."""
        if self._hf is not None:
            self._hf.close()
            self._hf = None

    def close(self) -> None:
        """Lets go of everything."""
        self.close_hf()
        if self._engine is not None:
            self._engine.close()
            self._engine = None
