"""Models with quantised weights, through the engine, against the dequantised model in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.platforms import PlatformEnum

from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.engine.test_lora import RANK, adapter_of
from tests.engine.test_start_proof import prove_again
from tests.measured import Measured
from tests.oracle import oracle_scores
from tests.quantized_models import (
    SCHEMES,
    make_gpt_oss_with_mxfp4_experts,
    make_quantized_model,
    rounded,
)
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.worker import quantized, start_proof, traced_model
from vllm_flashtrace.worker.cpu_model import CPUTracedModel
from vllm_flashtrace.worker.runner import PROOF_ATTRIBUTE

TOKENS = torch.randint(5, 500, (300,), generator=torch.Generator().manual_seed(1)).tolist()
WEIGHTS = TargetWeights.from_mapping({i: 1.0 + i % 3 for i in [*range(150, 170), *range(250, 300)]})
LIMIT = 1e-3


def product_of_four_bits(
    input: torch.Tensor,
    q_weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> torch.Tensor:
    """What the kernel computes that vLLM builds for CPUs with AVX-512 only, for others.

    Weights are ``[out / 16, in * 2]``: blocks of 16 output channels, 8 to an int32.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    numbers = (q_weight.unflatten(1, (-1, 2))[..., None] >> shifts & 15).flatten(2)
    numbers = numbers.transpose(1, 2).flatten(0, 1)  # [out, in]
    zero = torch.full_like(scales, 8)
    if zeros is not None:
        zero = (zeros[..., None] >> shifts & 15).flatten(1).to(scales.dtype)
    size = numbers.shape[1] // len(scales)
    zero, scale = (t.float().t().repeat_interleave(size, 1) for t in (zero, scales))
    weight = (numbers - zero) * scale
    return torch.nn.functional.linear(
        input.float(), weight, None if bias is None else bias.float()
    ).to(input.dtype)


def quantized_again(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


class ProductOfBlocks(Fp8BlockScaledMMLinearKernel):
    """vLLM's kernel of FP8 in blocks with torch for the product: it has none for these CPUs.

    How activations are quantised, in groups, is vLLM's own.
    """

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    def apply_block_scaled_mm(
        self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
    ) -> torch.Tensor:
        rows, columns = self.weight_group_shape
        inputs = A.float() * As.repeat_interleave(columns, 1)
        scales = Bs.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return torch.nn.functional.linear(inputs, B.float() * scales)


def dequantised(layer: Any) -> torch.Tensor:
    """``[out, in]`` of a layer that Marlin's kernels, which are CUDA's, multiply by."""
    weight, scale = layer.weight.data, layer.weight_scale.data
    if weight.dtype == torch.float8_e4m3fn:  # [in, out], a scale for each channel
        return weight.t().float() * scale.view(-1, 1)
    codes = torch.stack([weight & 15, weight >> 4], -1).flatten(1).long()
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = torch.cat([numbers, -numbers])[codes]
    if scale.dtype == torch.uint8:  # exponents
        factors = (scale.float() - 127).exp2()
    else:
        factors = scale.float() * layer.weight_global_scale
    return numbers * factors.repeat_interleave(numbers.shape[1] // scale.shape[1], 1)


def put_torch_for_marlin(patch: pytest.MonkeyPatch) -> None:
    """Its classes, which leave activations as they are, with torch for the product."""
    always = classmethod(lambda *_: (True, None))

    def apply_weights(_: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, dequantised(layer).to(x.dtype), bias)

    possible = {
        linear.MarlinFP8ScaledMMLinearKernel: linear._POSSIBLE_WFP8A16_KERNELS,
        linear.MarlinMxFp4LinearKernel: linear._POSSIBLE_MXFP4_KERNELS,
        linear.MarlinNvFp4LinearKernel: linear._POSSIBLE_NVFP4_KERNELS,
    }
    for kernel, kernels in possible.items():
        patch.setattr(kernel, "is_supported", always)
        patch.setattr(kernel, "process_weights_after_loading", lambda *_: None)
        patch.setattr(kernel, "apply_weights", apply_weights)
        patch.setitem(kernels, PlatformEnum.CPU, [kernel])


@contextmanager
def kernels_that_run_here(dtype: torch.dtype) -> Iterator[None]:
    """Torch in the place of the kernels that vLLM has for other CPUs, or for 16 bits, only."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float32:  # More exact than vLLM's kernels for four bits allow.
            for config in (
                AutoAWQConfig,
                AutoGPTQConfig,
                CompressedTensorsConfig,
                Fp8Config,
                OnlineQuantizationConfig,
            ):
                patch.setattr(config, "get_supported_act_dtypes", lambda *_: [torch.float32])
        # vLLM's CPU build quantises weights again as it loads them, with a kernel it has not.
        patch.setattr(_custom_ops, "scaled_fp8_quant", quantized_again)
        if dtype == torch.float32 or not hasattr(torch.ops._C, "cpu_gemm_wna16"):
            patch.setattr(_custom_ops, "cpu_gemm_wna16", product_of_four_bits)
        if dtype == torch.float32:
            kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS
            patch.setitem(kernels, PlatformEnum.CPU, [ProductOfBlocks])
        else:  # It asks for AMX, but does without.
            always = classmethod(lambda *_: (True, None))
            patch.setattr(linear.CPUFp8BlockScaledMMKernel, "is_supported", always)
        put_torch_for_marlin(patch)
        # vLLM's own in torch, that it has for any device but this.
        emulation = [linear.EmulationMxfp8LinearKernel]
        patch.setitem(linear._POSSIBLE_MXFP8_KERNELS, PlatformEnum.CPU, emulation)
        yield


@contextmanager
def served(folder: Path, dtype: torch.dtype, **options: Any) -> Iterator[Engine]:
    name = str(dtype).removeprefix("torch.")
    place = {"in_process": True, "max_model_len": 1024, "dtype": name}
    with kernels_that_run_here(dtype):
        engine = Engine(folder, "quantised weights", **place, **options)
        try:
            yield engine
        finally:
            engine.close()


def needs(kernel: str) -> None:
    if not hasattr(torch.ops._C, kernel):
        pytest.skip(f"vLLM's build for this CPU has no {kernel}")


# Activations that a float32 takes to another side of a rounding than the oracle does change others
# behind them; with int8 and a static scale there is none in this text.
@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [
        ("AWQ", torch.float32, 1e-3),
        ("GPTQ", torch.float32, 1e-3),
        ("compressed-tensors W4A16", torch.float32, 1e-3),
        ("compressed-tensors W4A16", torch.bfloat16, 5e-2),
        ("compressed-tensors int8 W8A8, asymmetric activations", torch.float32, 3e-2),
        ("compressed-tensors int8 W8A8 in some layers, static activations", torch.float32, 1e-3),
        ("compressed-tensors FP8 W8A8", torch.float32, 3e-2),
        ("FP8 per tensor, static activations", torch.float32, 5e-2),
        ("FP8 in blocks", torch.float32, 3e-2),
        ("FP8 in blocks, activations in 16 bits", torch.bfloat16, 5e-2),
        ("compressed-tensors FP8 W8A8 in blocks", torch.float32, 3e-2),
        ("compressed-tensors FP8 W8A16", torch.float32, 1e-3),
        ("compressed-tensors int W4A8", torch.float32, 3e-2),
        ("compressed-tensors MXFP8, activations in 16 bits", torch.float32, 1e-3),
        ("compressed-tensors MXFP4, activations in 16 bits", torch.float32, 1e-3),
        ("compressed-tensors NVFP4 W4A16", torch.float32, 1e-3),
    ],
)
def test_scheme(
    name: str, dtype: torch.dtype, limit: float, tmp_path: Path, measured: Measured
) -> None:
    if name == "FP8 in blocks, activations in 16 bits":
        needs("fp8_scaled_mm_cpu")
    scheme = SCHEMES[name]
    folder, model = make_quantized_model(scheme, tmp_path, dtype)
    expected = oracle_scores(model, TOKENS, WEIGHTS.positions, WEIGHTS.weights)
    with served(folder, dtype) as engine:
        scores = engine.trace(TraceJob(TOKENS, WEIGHTS)).scores
        proof = engine.on_worker(lambda worker: getattr(worker.model_runner, PROOF_ATTRIBUTE))
        dense = [layer.self_attn.o_proj.weight.detach() for layer in model.model.layers]
        matrix = max(engine.on_worker(matrix_error, *layer) for layer in enumerate(dense))
    error = relative_l1(scores, expected)
    note(measured, name, dtype, matrix, proof, error)
    kinds = {type(kind) for kind in proof["found"]["quantization"]}
    assert kinds == ({str, type(None)} if scheme.skipped else {str})
    assert matrix <= 1e-6 if dtype == torch.float32 else matrix <= 2**-8
    assert error <= limit


def note(
    measured: Measured,
    name: str,
    dtype: torch.dtype,
    matrix: float | None,
    proof: dict[str, Any],
    error: float | None,
) -> None:
    """The row of a scheme, whose name has the type where that is not float32."""
    numbers = {"matrix": matrix, "proof": proof["largest_error"], "scores": error}
    known = {key: value for key, value in numbers.items() if value is not None}
    kind = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    measured("quantized", f"{name}{kind}", **known)


def eight_bits(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


# How `--quantization` has the weights of an output projection of 128 inputs and outputs made.
WHILE_LOADING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fp8_per_tensor": lambda weight: eight_bits(weight, weight.abs().max() / 448),
    "fp8_per_channel": lambda weight: eight_bits(weight, weight.abs().amax(1, True) / 448),
    "fp8_per_block": lambda weight: eight_bits(weight, weight.abs().max() / 448),
}


# vLLM compiles what makes blocks.
@pytest.mark.parametrize(
    "name",
    [
        "fp8_per_tensor",
        "fp8_per_channel",
        pytest.param("fp8_per_block", marks=pytest.mark.long),
    ],
)
def test_quantised_while_loading(name: str, tmp_path: Path, measured: Measured) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = [layer.self_attn.o_proj.weight.detach() for layer in model.model.layers]
    with served(folder, torch.float32, quantization=name) as engine:
        proof = engine.on_worker(prove_again)
        made = [WHILE_LOADING[name](weight) for weight in weights]
        matrix = max(engine.on_worker(matrix_error, *layer) for layer in enumerate(made))
        scores = engine.trace(TraceJob(TOKENS, WEIGHTS)).scores
    row = f"`--quantization {name}`"
    note(measured, row, torch.float32, matrix, proof, None)
    assert proof["refusal"] is None and "made while loading" in proof["found"]["quantization"][0]
    assert matrix <= 1e-6
    if name != "fp8_per_channel":
        return  # Scales of projections that vLLM fuses are those of the fused ones.
    with torch.no_grad():
        for linear_name, module in model.named_modules():
            if linear_name.endswith("_proj"):
                module.weight.copy_(WHILE_LOADING[name](module.weight))
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], "fp8"),))
    error = relative_l1(scores, oracle_scores(model, TOKENS, WEIGHTS.positions, WEIGHTS.weights))
    note(measured, row, torch.float32, None, proof, error)
    assert error <= 3e-2


# The one rounds its inputs by a scale that is fixed, the other keeps them.
@pytest.mark.parametrize(
    "name", ["GPTQ", "compressed-tensors int8 W8A8 in some layers, static activations"]
)
def test_output_bias_and_multiplier(name: str, tmp_path: Path, measured: Measured) -> None:
    """A Granite, whose output projection has a bias, and whose residual multiplier is not 1."""
    folder, model = make_quantized_model(SCHEMES[name], tmp_path, torch.float32, "granite")
    expected = oracle_scores(model, TOKENS, WEIGHTS.positions, WEIGHTS.weights)
    with served(folder, torch.float32) as engine:
        error = relative_l1(engine.trace(TraceJob(TOKENS, WEIGHTS)).scores, expected)
        proof = engine.on_worker(prove_again)
        bias = engine.on_worker(read_bias)
    row = f"{name}; a bias and a multiplier"
    note(measured, row, torch.float32, None, proof, error)
    torch.testing.assert_close(bias, model.model.layers[0].self_attn.o_proj.bias.detach())
    assert proof["refusal"] is None and proof["found"]["output_bias"]
    assert proof["found"]["residual_multipliers"] == [0.22]
    assert error <= LIMIT


def test_adapter(tmp_path: Path, measured: Measured) -> None:
    """Beside a request without one: all layers' matrices are made in the same memory."""
    folder, model = make_quantized_model(SCHEMES["GPTQ"], tmp_path / "base", torch.float32)
    plain = oracle_scores(model, TOKENS, WEIGHTS.positions, WEIGHTS.weights)
    adapter = adapter_of(model, tmp_path / "adapter", 1, ["q_proj", "o_proj"])
    adapted = oracle_scores(adapter.model, TOKENS, WEIGHTS.positions, WEIGHTS.weights)
    assert relative_l1(plain, adapted) > 10 * LIMIT
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    with served(folder, torch.float32, **lora) as engine:
        jobs = [TraceJob(TOKENS, WEIGHTS, lora_request=adapter.request), TraceJob(TOKENS, WEIGHTS)]
        first, second = engine.trace_many(jobs)
    errors = relative_l1(first.scores, adapted), relative_l1(second.scores, plain)
    measured("ways", "GPTQ weights with a LoRA adapter", against="oracle", scores=errors[0])
    measured("ways", "GPTQ weights beside a LoRA adapter", against="oracle", scores=errors[1])
    assert max(errors) <= LIMIT


def read_bias(worker: Any) -> torch.Tensor:
    from vllm_flashtrace.worker.runner import runner_model

    layer = runner_model(worker.model_runner).layers[0]
    assert layer.quantization is not None
    return quantized.applied_bias(layer.out_proj, layer.quantization)


def test_quantised_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """A model of which nothing but its experts is quantised is traced as any."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsMxfp4

    needs("fused_experts_cpu")
    # It asks for AMX, but does without.
    monkeypatch.setattr(CPUExpertsMxfp4, "_supports_current_device", lambda: True)
    folder, model = make_gpt_oss_with_mxfp4_experts(tmp_path)
    expected = oracle_scores(model, TOKENS, WEIGHTS.positions, WEIGHTS.weights)
    with served(folder, torch.bfloat16) as engine:
        scores = engine.trace(TraceJob(TOKENS, WEIGHTS)).scores
        proof = engine.on_worker(prove_again)
        experts = engine.on_worker(kind_of_experts)
    error = relative_l1(scores, expected)
    note(measured, "gpt-oss with experts in MXFP4", torch.bfloat16, None, proof, error)
    assert experts == "GptOssMxfp4MoEMethod"
    assert proof["refusal"] is None and proof["found"]["quantization"] == [None]
    assert proof["found"]["sinks"]
    assert error <= 5e-2


def kind_of_experts(worker: Any) -> str:
    experts = worker.model_runner.get_model().model.layers[0].mlp.experts
    return type(experts.routed_experts.quant_method).__name__


def matrix_error(worker: Any, layer: int, weight: torch.Tensor) -> float:
    """Largest difference of a matrix that was read, relative to its largest number."""
    from vllm_flashtrace.worker.runner import runner_model

    read = runner_model(worker.model_runner).output_projection(layer).weight
    return float((read.double() - weight.double()).abs().max() / weight.abs().max())


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A model whose identity holds to the rounding of activations only."""
    scheme = SCHEMES["compressed-tensors int8 W8A8"]
    folder, _ = make_quantized_model(scheme, tmp_path_factory.mktemp("int8"), torch.float32)
    with served(folder, torch.float32) as engine:
        yield engine


def scaled(weight: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    wrong = weight.clone()
    wrong[rows, columns] *= 1.05
    return wrong


BREAKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a channel 5 % too large": lambda w: scaled(w, slice(7, 8), slice(None)),
    "a group of a channel 5 % too large": lambda w: scaled(w, slice(7, 8), slice(32, 64)),
    "swapped groups": lambda w: torch.cat([w[:, 32:64], w[:, :32], w[:, 64:]], 1),
    "a zero point off by one": lambda w: w + torch.eye(128)[:, 7:8] * w.abs().max() / 127,
    "the matrix transposed": lambda w: w.t(),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_matrix_is_seen(
    int8: Engine, name: str, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    stock = CPUTracedModel.output_projection

    def wrong(self: CPUTracedModel, layer: int, adapter: int | None = None) -> Any:
        read = stock(self, layer, adapter)
        return read._replace(weight=BREAKS[name](read.weight)) if layer == 2 else read

    monkeypatch.setattr(CPUTracedModel, "output_projection", wrong)
    report = int8.on_worker(prove_again)
    refusal = report["refusal"]
    found = re.search(r"relative error ([^,]+), limit", refusal)
    [measure] = [name for name, words in start_proof._MEASURES.items() if words in refusal]
    assert found is not None and "in layer 2" in refusal
    measured("breaks_int8", name, measure=measure, error=float(found[1]))
    monkeypatch.undo()
    assert int8.on_worker(prove_again)["refusal"] is None


def test_one_matrix_is_made_at_a_time(int8: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers are made in the same memory, beside which a trace takes that of a few rows."""
    places, largest = set(), 0
    stock = quantized.dequantize

    def made(projection: Any, scheme: Any, out: torch.Tensor) -> None:
        nonlocal largest
        places.add(out.data_ptr())
        with Allocations() as seen:
            stock(projection, scheme, out)
        largest = max(largest, seen.largest)

    monkeypatch.setattr(quantized, "_ROWS", 16)
    monkeypatch.setattr(traced_model, "dequantize", made)
    int8.trace(TraceJob(TOKENS, WEIGHTS))
    assert len(places) == 1
    assert 0 < largest <= 16 * 128  # numbers, of 128 * 128


class Allocations(TorchDispatchMode):
    """The largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and func._schema.name[-1] != "_":
            self.largest = max(self.largest, result.numel())
        return result


def test_new_scales_and_packings_are_new_weights(int8: Engine) -> None:
    def numbers(worker: Any) -> list[int]:
        from vllm_flashtrace.worker.runner import runner_model

        take = runner_model(worker.model_runner).fingerprint.take
        projection = worker.model_runner.get_model().model.layers[1].self_attn.o_proj
        taken = [int(take()), int(take())]
        projection.weight_scale.data[5] *= 1.5
        taken.append(int(take()))
        kernel, handler = projection.scheme.kernel, projection.scheme.kernel.dnnl_handler
        kernel.dnnl_handler = type(handler)()
        taken.append(int(take()))
        kernel.dnnl_handler = handler
        projection.weight_scale.data[5] /= 1.5
        return taken

    first, again, scaled, packed = int8.on_worker(numbers)
    assert first == again
    assert len({first, scaled, packed}) == 3
