"""Connectors and an offloading medium that keep KV blocks in this process, for engines in it.

`MemoryConnector` is as unforgiving as vLLM's interface allows: it offers all that it has, up to the
last token of a prompt, does not load a part of what it has offered, fills the blocks of a load with
garbage until the load is over, and can fail.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.kv_cache_interface import group_kernel_blocks
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

GARBAGE = 7.0


def memory_connector(**behaviour: Any) -> dict[str, Any]:
    """``kv_transfer_config`` of a `MemoryConnector`.

    Args:
        behaviour: Attributes of `Behaviour`.
    """
    Behaviour.reset(**behaviour)
    return {
        "kv_connector": MemoryConnector.__name__,
        "kv_connector_module_path": __name__,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }


def memory_offloading(**extra: Any) -> dict[str, Any]:
    """``kv_transfer_config`` of vLLM's `OffloadingConnector` over a `MemoryOffloadingSpec`."""
    config = {
        "spec_name": MemoryOffloadingSpec.__name__,
        "spec_module_path": __name__,
        "cpu_bytes_to_use": 64 << 20,
        "offload_prompt_only": False,
    }
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": config | extra,
    }


class Behaviour:
    """What the `MemoryConnector` of this process does, and what it has done.

    Attributes:
        loads_async: Whether requests wait for a load, or the step that computes them does.
        steps: How many steps a load that requests wait for takes.
        failing: Places of blocks that fail in the next load that has one.
        store: Blocks of all layers by hash.
        offered: Tokens that were offered to requests, in order.
        loaded: Tokens that were loaded, in order.
        failed: Loads that failed.
    """

    loads_async: ClassVar[bool]
    steps: ClassVar[int]
    failing: ClassVar[frozenset[int]]
    store: ClassVar[dict[bytes, list[torch.Tensor]]]
    offered: ClassVar[list[int]]
    loaded: ClassVar[list[int]]
    failed: ClassVar[int]
    caches: ClassVar[list[torch.Tensor]]

    @classmethod
    def reset(cls, *, loads_async: bool = True, steps: int = 3) -> None:
        cls.loads_async, cls.steps, cls.failing = loads_async, steps, frozenset()
        cls.store, cls.offered, cls.loaded, cls.failed = {}, [], [], 0


@dataclasses.dataclass
class Load:
    """A load of a request: its blocks in the cache, and what they are to hold."""

    req_id: str
    block_ids: list[int]
    hashes: list[bytes]
    steps: int = 0


@dataclasses.dataclass
class Loads(KVConnectorMetadata):
    """The loads that begin with a step."""

    loads: list[Load]


class MemoryConnector(KVConnectorBase_V1):
    """Keeps the full blocks of every request that has finished."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = vllm_config.cache_config.block_size
        self._offers: dict[str, tuple[int, int]] = {}
        self._loads: list[Load] = []
        self._waiting: list[Load] = []
        self._errors: set[int] = set()

    # --- in the scheduler ---

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        first = num_computed_tokens // self._block_size
        # A step computes at least one token; a request that waits may have all loaded.
        tokens = request.num_tokens if Behaviour.loads_async else request.num_tokens - 1
        found = 0
        for block_hash in request.block_hashes[first : tokens // self._block_size]:
            if block_hash not in Behaviour.store:
                break
            found += self._block_size
        self._offers[request.request_id] = first, found
        Behaviour.offered.append(found)
        return found, found > 0 and Behaviour.loads_async

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        first, offered = self._offers.get(request.request_id, (0, 0))
        assert num_external_tokens in (0, offered), "a part of an offer is not loaded"
        if num_external_tokens:
            part = slice(first, first + num_external_tokens // self._block_size)
            self._loads.append(
                Load(
                    request.request_id, blocks.get_block_ids()[0][part], request.block_hashes[part]
                )
            )

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        loads, self._loads = self._loads, []
        return Loads(loads)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        self._offers.pop(request.request_id, None)
        for block_hash, block in zip(request.block_hashes, block_ids, strict=False):
            kept = [cache[block].clone() for cache in Behaviour.caches]
            Behaviour.store.setdefault(block_hash, kept)
        return False, None

    # --- in the worker ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        blocks = self._kv_cache_config.num_blocks
        Behaviour.caches = [group_kernel_blocks(each, blocks) for each in kv_caches.values()]

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        for load in self._get_connector_metadata().loads:
            for block in load.block_ids:
                for cache in Behaviour.caches:
                    cache[block] = GARBAGE
            if Behaviour.loads_async:
                self._waiting.append(load)
            else:
                self._finish(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are there when `start_load_kv` is over."""

    def save_kv_layer(self, *_: Any, **__: Any) -> None:
        """Blocks are saved when their request has finished."""

    def wait_for_save(self) -> None:
        """As above."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        over = []
        for load in self._waiting:
            load.steps += 1
            if load.steps >= Behaviour.steps:
                over.append(load)
        for load in over:
            self._waiting.remove(load)
            self._finish(load)
        return None, {load.req_id for load in over}

    def get_block_ids_with_load_errors(self) -> set[int]:
        errors, self._errors = self._errors, set()
        return errors

    def _finish(self, load: Load) -> None:
        pairs = zip(load.block_ids, load.hashes, strict=True)
        for place, (block, block_hash) in enumerate(pairs):
            if place in Behaviour.failing:
                self._errors.add(block)
                continue
            for cache, kept in zip(Behaviour.caches, Behaviour.store[block_hash], strict=True):
                cache[block] = kept
        if self._errors:
            Behaviour.failed += 1
            Behaviour.failing = frozenset()
        Behaviour.loaded.append(len(load.block_ids) * self._block_size)


class MemoryOffloadingSpec(CPUOffloadingSpec):
    """vLLM's tier in the memory of the host, whose own worker copies from GPUs alone."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> MemoryOffloadingWorker:
        return MemoryOffloadingWorker(kv_caches, self.num_chunks, self.blocks_per_chunk)


class MemoryOffloadingWorker(OffloadingWorker):
    """Copies blocks; what it has copied in a step it reports in the next.

    Attributes:
        loaded: Blocks that were loaded, in order, of the worker made last.
        stored: Blocks that were stored, of the worker made last.
    """

    loaded: ClassVar[list[int]]
    stored: ClassVar[int]

    def __init__(self, caches: CanonicalKVCaches, chunks: int, blocks_per_chunk: int) -> None:
        self._caches, self._per_chunk = caches, blocks_per_chunk
        self._host = [
            torch.zeros(chunks * blocks_per_chunk, each.page_size_bytes, dtype=torch.int8)
            for each in caches.tensors
        ]
        self._queued: list[tuple[int, Any, Any, bool]] = []
        type(self).loaded, type(self).stored = [], 0

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self._copy(src_spec, dst_spec, load=False)
        type(self).stored += len(src_spec.block_ids)
        self._queued.append((job_id, None, None, False))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for index in {ref.tensor_idx for refs in self._caches.group_data_refs for ref in refs}:
            self._caches.tensors[index].tensor[dst_spec.block_ids] = int(GARBAGE)
        self._queued.append((job_id, src_spec, dst_spec, True))
        return True

    def get_finished(self) -> list[TransferResult]:
        queued, self._queued = self._queued, []
        for _, host, device, is_load in queued:
            if is_load:
                self._copy(device, host, load=True)
                type(self).loaded.append(len(device.block_ids))
        return [TransferResult(job_id, True, 0, 0.0) for job_id, *_ in queued]

    def wait(self, job_ids: set[int]) -> None:
        """Stores are copied at once."""

    def _copy(self, device: Any, host: Any, *, load: bool) -> None:
        first, chunk = 0, 0
        groups = zip(
            device.group_sizes, device.block_indices, self._caches.group_data_refs, strict=True
        )
        for size, start, refs in groups:
            for number in range(size):
                place = start % self._per_chunk + number
                row = int(host.block_ids[chunk + place // self._per_chunk])
                row = row * self._per_chunk + place % self._per_chunk
                block = int(device.block_ids[first + number])
                for index in {ref.tensor_idx for ref in refs}:
                    there, here = self._host[index], self._caches.tensors[index].tensor
                    if load:
                        here[block] = there[row]
                    else:
                        there[row] = here[block]
            first += size
            chunk += -(-(start % self._per_chunk + size) // self._per_chunk) if size else 0
