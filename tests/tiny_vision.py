"""Tiny random models that see images.

As in `tiny_models`, with a vision tower of two layers whose patches are 4 pixels wide, so that a
token of an image stands for 8 by 8 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tests import tiny_models
from tests.oracle import oracle_scores
from tests.tiny_models import VOCABULARY
from vllm_flashtrace.core.weights import TargetWeights

VisionFamily = Literal["qwen2_5_vl", "qwen3_vl"]
VISION_FAMILIES = get_args(VisionFamily)
PIXELS = 8
"""Pixels that a token of an image is wide and high."""

_SPECIALS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VISION_START, VISION_END, IMAGE_TOKEN, VIDEO_TOKEN = range(VOCABULARY, VOCABULARY + len(_SPECIALS))
_ROWS = 640  # Of the embedding, more than there are tokens.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def picture_scores(
    model: Any, processor: Any, tokens: Sequence[int], target: TargetWeights, pictures: list[Any]
) -> torch.Tensor:
    """The oracle's scores of a prompt with pictures; it sees what Transformers makes of them."""
    seen = processor(images=pictures, return_tensors="pt")
    return oracle_scores(
        model,
        tokens,
        target.positions,
        target.weights,
        mm_token_type_ids=(torch.tensor([tokens]) == IMAGE_TOKEN).int(),
        pixel_values=seen["pixel_values"].double(),
        image_grid_thw=seen["image_grid_thw"],
    )


def make_tiny_vision_model(family: VisionFamily, folder: Path, *, seed: int = 0) -> Path:
    """Writes a random model with its tokenizer and image processor into folder and returns it."""
    import transformers as hf

    config = _config(family)
    kind = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config)
    folder = tiny_models._write(model, Path(folder), seed)
    tokenizer = tiny_models._tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIALS})
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "processor_class": f"{kind}Processor",
                "image_processor_type": "Qwen2VLImageProcessor",
                "patch_size": PIXELS // 2,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": [0.48, 0.46, 0.41],
                "image_std": [0.27, 0.26, 0.28],
                "size": {"shortest_edge": 4 * PIXELS**2, "longest_edge": 64 * PIXELS**2},
            }
        )
    )
    return folder


def _config(family: VisionFamily) -> Any:
    import transformers as hf

    sizes = tiny_models._sizes(2) | {"vocab_size": _ROWS}
    del sizes["tie_word_embeddings"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "patch_size": PIXELS // 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": sizes["hidden_size"],
    }
    tokens = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": False,
    }
    if family == "qwen2_5_vl":
        vision |= {"window_size": 2 * PIXELS, "fullatt_block_indexes": [1]}
        text = sizes | {"rope_parameters": rope}
        return hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = sizes | {"rope_parameters": rope | {"mrope_interleaved": True}, "head_dim": 32}
    return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
