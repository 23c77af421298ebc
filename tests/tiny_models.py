"""Tiny random models of each supported family, for tests that need a real checkpoint.

Run as a module to write one: ``python -m tests.tiny_models qwen3 FOLDER``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import torch

Family = Literal[
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "phi3",
    "mixtral",
    "gemma",
    "granite",
    "gemma2",
    "gemma3",
    "glm4",
    "gpt_oss",
    "olmo2",
    "olmo3",
    "exaone4",
    "deepseek_v2",
    "deepseek_v3",
    "afmoe",
    "laguna",
    "laguna_elements",
    "llama4",
    "granite_hybrid",
    "qwen3_next",
]
FAMILY_NAMES: dict[Family, str] = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "mistral": "Mistral",
    "phi3": "Phi-3",
    "mixtral": "Mixtral",
    "gemma": "Gemma",
    "granite": "Granite",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
    "glm4": "GLM-4",
    "gpt_oss": "gpt-oss",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "exaone4": "EXAONE 4",
    "llama4": "Llama 4",
    "deepseek_v2": "DeepSeek V2",
    "deepseek_v3": "DeepSeek V3",
    "afmoe": "AfMoE",
    "laguna": "Laguna, a gate for each head",
    "laguna_elements": "Laguna, a gate for each coordinate",
    "granite_hybrid": "Granite 4, half of its layers",
    "qwen3_next": "Qwen3-Next, half of its layers",
}
"""By which the support page calls them."""
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "qwen3_moe")
# Other architectures, which are traced because they are proven at the start.
# Some layers have no attention: they are traced only where that is asked for.
HYBRIDS: tuple[Family, ...] = ("granite_hybrid", "qwen3_next")
PROVEN_FAMILIES = tuple(
    family for family in get_args(Family) if family not in (*FAMILIES, *HYBRIDS)
)
# vLLM does not read of the config that queries grow with their position.
LLAMA4_ENGINE: dict[str, Any] = {"override_generation_config": {"attn_temperature_tuning": True}}
VOCABULARY = 512
MAX_POSITION = 2048

_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_THINK = ["<think>", "</think>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CORPUS = [
    "The harbour master wrote the tide times on a slate every morning before the boats went out.",
    "If the train leaves at seven and the journey takes two hours, it arrives at nine.",
    "The secret number of the northern lighthouse is 4821, and nobody else on the island knows it.",
    "Question: which box holds the key? Answer: the small green box under the window.",
    "She counted 12 apples, 7 pears and 30 plums, then divided them among the children.",
    "You are a helpful assistant. Think step by step, then give the final answer.",
    "def add(first, second): return first + second  # the sum of both numbers",
    "Therefore the total is 49, because twelve plus seven plus thirty makes forty-nine.",
    "What is the capital of the country where the river begins? Let me think about that again.",
    "Wait, the second clue said that the bridge was closed, so they must have taken the ferry.",
]


def make_tiny_model(
    family: Family, folder: Path, *, seed: int = 0, num_kv_heads: int = 2, experts: bool = True
) -> Path:
    """Writes a random 4-layer float32 model with its tokenizer into folder and returns folder.

    Hidden size 128, 4 query and, by default, 2 key/value heads of size 32, vocabulary 512, 2048
    positions. The weights are scaled so that attention is far from uniform; norms and biases are
    random too. A DeepSeek without ``experts`` has sizes that blocks of quantised weights divide.
    """
    return _write(_model(family, num_kv_heads, experts), Path(folder), seed)


def make_other_model(name: str, folder: Path, **config: Any) -> Path:
    """As `make_tiny_model` for a model of Transformers that has no family here.

    Args:
        name: What its classes' names begin with.
        folder: Where it goes.
        config: What it needs besides the sizes of the others.
    """
    import transformers as hf

    made = getattr(hf, f"{name}Config")(**_sizes(2), **config)
    return _write(getattr(hf, f"{name}ForCausalLM")(made), folder, 0)


def _write(model: Any, folder: Path, seed: int) -> Path:
    _randomise(model, seed)
    model.generation_config.eos_token_id = _SPECIALS.index("<|im_end|>")
    model.generation_config.pad_token_id = _SPECIALS.index("<|endoftext|>")
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def make_windowed_llama(folder: Path, kinds: tuple[str, str]) -> tuple[Path, Path]:
    """A tiny Llama of four layers with windows of 64 tokens.

    Args:
        folder: Where the two folders go.
        kinds: ``layer_types`` of the first two layers, and of the others.

    Returns:
        The model as vLLM loads it, and the same weights under the name by which transformers knows
        a Llama with windows.
    """
    model, reference = make_tiny_model("llama", folder / "windowed"), folder / "reference"
    windows = {"sliding_window": 64, "layer_types": list(kinds) * 2}
    shutil.copytree(model, reference)
    names = {"architectures": ["MinistralForCausalLM"], "model_type": "ministral"}
    for place, changes in ((model, windows), (reference, windows | names)):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | changes))
    return model, reference


def _sizes(num_kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": MAX_POSITION,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": _SPECIALS.index("<|im_end|>"),
        "pad_token_id": _SPECIALS.index("<|endoftext|>"),
        "dtype": "float32",
    }


def _model(family: Family, num_kv_heads: int, with_experts: bool = True) -> Any:
    import transformers as hf

    common = _sizes(num_kv_heads)
    if family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**common, head_dim=32))
    if family == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**common))
    if family == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**common, head_dim=32))
    if family == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        config = hf.Qwen3MoeConfig(**common, **experts, head_dim=32, norm_topk_prob=True)
        return hf.Qwen3MoeForCausalLM(config)
    if family == "mistral":
        return hf.MistralForCausalLM(hf.MistralConfig(**common, head_dim=32, sliding_window=None))
    if family == "phi3":
        return hf.Phi3ForCausalLM(hf.Phi3Config(**common))
    if family == "mixtral":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
        return hf.MixtralForCausalLM(hf.MixtralConfig(**common, **experts))
    if family == "gemma":
        return hf.GemmaForCausalLM(hf.GemmaConfig(**common, head_dim=32))
    if family == "granite":
        multipliers = {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.22,
            "logits_scaling": 4.0,
        }
        return hf.GraniteForCausalLM(hf.GraniteConfig(**common, **multipliers, attention_bias=True))
    windows = {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    if family == "gemma2":
        common["tie_word_embeddings"] = True  # In vLLM's Gemma 2 they always are.
        caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 30.0}
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(**common, **windows, **caps))
    if family == "gemma3":
        return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**common, **windows))
    if family == "glm4":
        return hf.Glm4ForCausalLM(hf.Glm4Config(**common, head_dim=32, attention_bias=True))
    if family == "gpt_oss":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
        yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "truncate": False}
        rope = {
            **yarn,
            "original_max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        }
        return hf.GptOssForCausalLM(
            hf.GptOssConfig(
                **{**common, "rms_norm_eps": 1e-5},  # vLLM's, whatever the config says.
                **experts,
                head_dim=32,
                sliding_window=32,
                rope_parameters=rope,
            )
        )
    if family == "exaone4":
        kinds = {"sliding_window": 32, "layer_types": windows["layer_types"]}
        return hf.Exaone4ForCausalLM(hf.Exaone4Config(**common, **kinds))
    if family in ("deepseek_v2", "deepseek_v3"):
        return _deepseek(family, with_experts)
    if family == "afmoe":
        kinds = {"sliding_window": 64, "layer_types": windows["layer_types"]}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        routing = {"n_group": 1, "topk_group": 1, "score_func": "sigmoid", "route_norm": True}
        config = hf.AfmoeConfig(
            **common, **kinds, **experts, **routing, head_dim=32, num_dense_layers=3
        )
        return hf.AfmoeForCausalLM(config)
    if family.startswith("laguna"):
        return hf.LagunaForCausalLM(
            hf.LagunaConfig(
                **common,
                head_dim=32,
                mlp_layer_types=["dense"] * 4,
                gating="per-element" if family == "laguna_elements" else "per-head",
            )
        )
    if family == "llama4":
        return _llama4(common)
    if family == "granite_hybrid":
        states = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1}
        multipliers = {"residual_multiplier": 0.5, "attention_multiplier": 0.25}
        return hf.GraniteMoeHybridForCausalLM(
            hf.GraniteMoeHybridConfig(
                **common,
                **states,
                **multipliers,
                layer_types=["mamba", "attention"] * 2,
                num_local_experts=0,
                num_experts_per_tok=0,
                shared_intermediate_size=256,
            )
        )
    if family == "qwen3_next":
        linear = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
        heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        # Behind attention alone, since in bfloat16 rounding chooses between experts.
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0, 1, 2]}
        sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
        return hf.Qwen3NextForCausalLM(
            hf.Qwen3NextConfig(
                **common,
                **linear,
                **heads,
                **experts,
                **sizes,
                head_dim=32,
                layer_types=["linear_attention", "full_attention"] * 2,
            )
        )
    if family == "olmo2":
        return hf.Olmo2ForCausalLM(hf.Olmo2Config(**common))
    if family == "olmo3":
        kinds = {"sliding_window": 32, "layer_types": windows["layer_types"]}
        return hf.Olmo3ForCausalLM(hf.Olmo3Config(**common, **kinds))
    raise ValueError(f"unknown family {family!r}; one of {', '.join(get_args(Family))}")


def _deepseek(family: Family, experts: bool) -> Any:
    """Latent attention, whose latents have the only size for which vLLM has a CPU kernel.

    The first two layers are dense. V2's queries come straight from the stream and V3's through a
    low rank. Both have YaRN, whose factor is in the scale of the logits too.
    """
    import transformers as hf

    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "beta_fast": 32.0, "beta_slow": 1.0}
    rope = {
        **yarn,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    }
    made = {
        **_sizes(4),
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 48,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 2,
        "topk_group": 1,
        "rope_parameters": rope,
    }
    low_rank = 96
    if not experts:
        low_rank = 128
        made |= {"first_k_dense_replace": 4, "v_head_dim": 64}
    if family == "deepseek_v2":
        config = hf.DeepseekV2Config(**made, q_lora_rank=None, n_group=1)
        return hf.DeepseekV2ForCausalLM(config)
    routing = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # Read by vLLM alone.
    config = hf.DeepseekV3Config(**made, **routing, q_lora_rank=low_rank, n_group=2)
    return hf.DeepseekV3ForCausalLM(config)


def _llama4(common: dict[str, Any]) -> Any:
    """Chunks of 32 tokens in all layers but the last, which has no positions; experts in two.

    In the last layer queries grow every 16 tokens. See `LLAMA4_ENGINE`.
    """
    import transformers as hf

    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **common,
            **experts,
            head_dim=32,
            intermediate_size_mlp=256,
            attention_chunk_size=32,
            floor_scale=16,
            attn_scale=0.5,
            rope_parameters=rope,
        )
    )


def _randomise(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:  # before the projections: q_norm and k_norm are norms
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif name.endswith("sinks"):
                parameter.copy_(2 + noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            elif any(projection in name for projection in ("q_proj", "k_proj", "q_b_proj")):
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def _tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(_THINK),
        min_frequency=1,
        special_tokens=_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in _THINK])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"the corpus gives {tokenizer.get_vocab_size()} tokens")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=MAX_POSITION,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    print(make_tiny_model(sys.argv[1], Path(sys.argv[2])))  # type: ignore[arg-type]
