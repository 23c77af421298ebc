"""The file of learned weights of heads: written by ``vllm-flashtrace fit-heads``, read by servers.

A safetensors file with one tensor, ``weights``, float32 ``[layers, query heads]`` of the whole
model, and in its metadata the model that they are of and what they were learned from. Whoever reads
it refuses weights of another model: they would give well-formed scores that say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_flashtrace.base import __version__

FORMAT = "vllm-flashtrace.heads.1"
_TENSOR = "weights"


class HeadsFileError(ValueError):
    """A file of weights of heads that is refused; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What tells the models apart that weights of heads can be of.

    Attributes:
        architecture: Name of the architecture.
        layers: Decoder layers.
        heads: Query heads of a layer.
        hidden_size: Size of the residual stream.
    """

    architecture: str
    layers: int
    heads: int
    hidden_size: int

    @classmethod
    def of(cls, vllm_config: Any) -> ModelFacts:
        """Those of the model that an engine with this ``VllmConfig`` serves."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        own = model.get_num_attention_heads(parallel)
        return cls(
            str(model.architecture),
            int(model.get_total_num_hidden_layers()),
            int(own * parallel.tensor_parallel_size),
            int(model.get_hidden_size()),
        )


@dataclass(frozen=True, slots=True)
class HeadsFile:
    """The contents of a file.

    Attributes:
        weights: float32 ``[layers, heads]``, finite, not negative, and not all 0.
        model: The model that they are of.
        examples: How many answers they were learned from.
        ablations: How many ablations these had together.
        held_out: Mean rank correlation on answers that were held out; None where none were.
        version: Version of this package that wrote it.
    """

    weights: Tensor
    model: ModelFacts
    examples: int
    ablations: int
    held_out: float | None = None
    version: str = __version__

    def write(self, path: Path) -> None:
        """Writes the file.

        Raises:
            OSError: It cannot be written.
        """
        metadata = {
            "format": FORMAT,
            **{name: str(value) for name, value in asdict(self.model).items()},
            "version": self.version,
            "examples": str(self.examples),
            "ablations": str(self.ablations),
            "held_out_rank_correlation": "" if self.held_out is None else f"{self.held_out:.4f}",
        }
        save_file({_TENSOR: self.weights.float().contiguous()}, path, metadata)

    @classmethod
    def read(cls, path: Path) -> HeadsFile:
        """Reads and checks a file.

        Raises:
            HeadsFileError: There is none, it is no such file, or its weights are malformed.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = set(file.keys())
                weights = file.get_tensor(_TENSOR) if _TENSOR in names else None
        except (OSError, SafetensorError) as error:
            raise HeadsFileError(f"{path} cannot be read: {error}") from None
        if (version := metadata.get("format")) != FORMAT:
            found = "has no format" if version is None else f"is of format {version!r}"
            raise HeadsFileError(f"{path} {found}; vllm-flashtrace fit-heads writes {FORMAT!r}")
        if weights is None or names != {_TENSOR}:
            raise HeadsFileError(f"{path} has the tensors {sorted(names)}, not '{_TENSOR}' alone")
        try:
            file = cls._of(weights, metadata)
        except (KeyError, ValueError) as error:
            raise HeadsFileError(f"{path} has malformed metadata: {error!r}") from None
        if (reason := _malformed(weights, file.model)) is not None:
            raise HeadsFileError(f"{path} has weights {reason}")
        return file

    @classmethod
    def _of(cls, weights: Tensor, metadata: Mapping[str, str]) -> HeadsFile:
        held_out = metadata["held_out_rank_correlation"]
        return cls(
            weights,
            ModelFacts(
                metadata["architecture"],
                *(int(metadata[name]) for name in ("layers", "heads", "hidden_size")),
            ),
            int(metadata["examples"]),
            int(metadata["ablations"]),
            float(held_out) if held_out else None,
            metadata["version"],
        )

    def check_model(self, served: ModelFacts, path: Path) -> None:
        """Refuses to go with another model.

        Raises:
            HeadsFileError: Naming what differs.
        """
        own, other = asdict(self.model), asdict(served)
        differing = [
            f"{name} {own[name]}, not {other[name]}" for name in own if own[name] != other[name]
        ]
        if differing:
            raise HeadsFileError(f"{path} is of another model: {'; '.join(differing)}")


def _malformed(weights: Tensor, model: ModelFacts) -> str | None:
    """What is wrong with weights, or None."""
    if weights.dtype != torch.float32:
        return f"of type {weights.dtype}, not float32"
    if tuple(weights.shape) != (model.layers, model.heads):
        return f"of shape {tuple(weights.shape)} for {model.layers} layers of {model.heads} heads"
    if not bool(weights.isfinite().all()):
        return "that are not finite"
    if bool((weights < 0).any()):
        return "below 0"
    return None if bool(weights.any()) else "that are all 0"


def served_heads(path: str | None, vllm_config: Any) -> Tensor | None:
    """The weights in the file of the option ``heads``, which fit the served model.

    Args:
        path: The option; None where the server has none.
        vllm_config: The engine's ``VllmConfig``.

    Returns:
        float32 ``[layers, heads]`` of the whole model, or None.

    Raises:
        HeadsFileError: The file is refused.
    """
    if path is None:
        return None
    file = HeadsFile.read(Path(path))
    file.check_model(ModelFacts.of(vllm_config), Path(path))
    return file.weights
