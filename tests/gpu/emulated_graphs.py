"""CUDA graphs on CPU tensors: what is captured is a list of operations on addresses.

A capture notes every operation of torch that is launched, with its tensors; a replay runs the list
again on the same memory, without any Python of the model. Custom operators of the taps launch
nothing themselves, so what their code launches is noted in their place. As on a GPU, nothing is
computed while a graph is captured, and graphs share a pool: what a piece does not hand on is
overwritten when its replay is over, and all of it when the graphs of another step are replayed.

vLLM's own compilation (with the backend ``eager``), splitting, wrappers, graph manager and runner
run on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.compilation import cuda_graph
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import cudagraph_utils

from tests.gpu.standin_runner import TorchBlockTables, graph_manager
from vllm_flashtrace.worker import taps


class Pool:
    """All graphs of a process.

    Attributes:
        graphs: In the order of their capture.
        replayed: The descriptors of the graphs that were replayed.
        fails: Called with each operation of a capture; may raise.
    """

    def __init__(self) -> None:
        self.graphs: list[EmulatedGraph] = []
        self.replayed: list[Any] = []
        self.fails: Callable[[str], None] = lambda _: None

    def operations(self, descriptor: Any) -> list[list[str]]:
        """Names of the operations of each piece of one descriptor."""
        return [
            [str(operation) for operation, *_ in graph.operations]
            for graph in self.graphs
            if graph.descriptor == descriptor
        ]


class EmulatedGraph:
    """Stands in for ``torch.cuda.CUDAGraph``."""

    pool: Pool

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.memory: list[Tensor] = []
        self.handed_on: set[int] = set()
        self.descriptor: Any = None

    def replay(self) -> None:
        """Runs the operations; what they allocate lies where it lay at the capture."""
        pool = self.pool
        if pool.replayed and pool.replayed[-1] != self.descriptor:
            for graph in pool.graphs:
                if graph.descriptor != self.descriptor:
                    overwrite(graph.memory)
        pool.replayed.append(self.descriptor)
        for operation, args, kwargs, new in self.operations:
            found = [leaf for leaf in tree_leaves(operation(*args, **kwargs)) if is_tensor(leaf)]
            for there, result in zip(new, found, strict=True):
                if address(there) != address(result):
                    there.copy_(result)
        overwrite([made for made in self.memory if address(made) not in self.handed_on])


def is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def overwrite(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)


class _Capturing(TorchDispatchMode):
    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()
        self.graph = graph
        self._foreign: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "flashtrace":
            with self:
                getattr(taps, f"_{name}")(*args, **kwargs)
            return None
        self.graph.pool.fails(name)
        result = func(*args, **kwargs)
        new = [leaf for leaf in tree_leaves(result) if is_tensor(leaf)]
        given = {address(leaf) for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)}
        self.graph.memory += [made for made in new if address(made) not in given]
        self.graph.operations.append((func, args, kwargs, new))
        return result


@contextlib.contextmanager
def emulated_capture(graph: EmulatedGraph, pool: Any = None, stream: Any = None) -> Iterator[None]:
    """Stands in for ``torch.cuda.graph``."""
    graph.descriptor = get_forward_context().batch_descriptor
    with _Capturing(graph):
        yield
    graph.pool.graphs.append(graph)
    overwrite(graph.memory)  # Nothing was computed.


@contextlib.contextmanager
def emulated_graphs() -> Iterator[Pool]:
    """Lets vLLM capture and replay graphs here."""
    pool = Pool()

    def hand_on(output: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(output) if is_tensor(leaf)]
        pool.graphs[-1].handed_on.update(map(address, tensors)) if pool.graphs else None
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmulatedGraph, "pool", pool, raising=False)
        patch.setattr(torch.cuda, "CUDAGraph", EmulatedGraph)
        patch.setattr(torch.cuda, "graph", emulated_capture)
        patch.setattr(cuda_graph, "weak_ref_tensors", hand_on)
        patch.setattr(cuda_graph, "current_stream", lambda: None)
        for module in (cuda_graph, cudagraph_utils):
            patch.setattr(module, "capture_pool", lambda *_: contextlib.nullcontext())
        patch.setattr(cudagraph_utils, "graph_capture", lambda **_: contextlib.nullcontext())
        platform = type(current_platform)
        patch.setattr(
            platform,
            "get_static_graph_wrapper_cls",
            classmethod(lambda _: "vllm.compilation.cuda_graph.CUDAGraphWrapper"),
        )
        patch.setattr(platform, "get_global_graph_pool", lambda _: None, raising=False)
        yield pool


@contextlib.contextmanager
def compiled_pieces(
    mode: CUDAGraphMode = CUDAGraphMode.PIECEWISE, **options: Any
) -> Iterator[None]:
    """Has engines of stand-in kernels compiled in pieces, as vLLM does by default on CUDA.

    Args:
        mode: Their CUDA graph mode.
        options: Options of ours.
    """
    stock = EngineArgs.create_engine_config

    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        config = stock(self, *args, **kwargs)
        config.additional_config = {"flashtrace": options}
        compilation = config.compilation_config
        compilation.mode = CompilationMode.VLLM_COMPILE
        compilation.backend = "eager"
        compilation.custom_ops = ["none"]
        compilation.cudagraph_mode = mode
        compilation.splitting_ops = None
        compilation.use_inductor_graph_partition = False
        compilation.compile_sizes = []
        compilation.cudagraph_num_of_warmups = 1
        for field in dataclasses.fields(compilation.pass_config):  # Passes for kernels of CUDA.
            if isinstance(getattr(compilation.pass_config, field.name), bool):
                setattr(compilation.pass_config, field.name, False)
        compilation.set_splitting_ops_for_v1("naive")
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineArgs, "create_engine_config", create_engine_config)
        yield


class DummyBlockTables(TorchBlockTables):
    """With what vLLM asks for when it captures."""

    cp_size = 1

    def get_dummy_block_tables(self, num_reqs: int) -> tuple[Tensor, ...]:
        self.input_rows[:num_reqs] = 0
        return (self.input_rows[:num_reqs],)

    def get_dummy_slot_mappings(self, num_tokens: int) -> Tensor:
        return torch.full((1, num_tokens), -1, dtype=torch.int64)


def capture(engine: Any, sizes: Sequence[int], patch: pytest.MonkeyPatch) -> Any:
    """Has a runner capture its graphs, by vLLM's own manager; returns the manager."""
    runner = engine.runner
    mode = engine.config.compilation_config.cudagraph_mode
    manager = graph_manager(engine.config, mode, sizes, patch)
    manager._graphs_captured = False
    runner.cudagraph_manager = manager
    runner.block_tables.__class__ = DummyBlockTables
    patch.setattr(
        type(runner), "maybe_setup_dummy_loras", lambda *_: contextlib.nullcontext(), raising=False
    )
    runner.model_state.supports_mm_inputs = False
    runner.intermediate_tensors = getattr(runner, "intermediate_tensors", None)
    runner.speculator = None
    runner.kv_connector = SimpleNamespace(
        **{n: getattr(runner.kv_connector, n) for n in dir(runner.kv_connector) if n[0] != "_"},
    )
    runner.capture_model(profile_only=True)  # Else it locks a workspace that nobody has here.
    return manager
