"""A worker in which some traces fail, for `mixed_load`."""

from __future__ import annotations

from typing import Any


class FailSome:
    """``--worker-extension-cls`` of the server under load."""

    def fail_some(self, share: float) -> None:
        """Lets a share of all trace requests fail at the end of their prefill, chosen by nonce."""
        from vllm_flashtrace.worker.recorder import Recorder

        stock = Recorder._finish

        def finish(recorder: Recorder, segment: Any) -> Any:
            if int(segment.trace.spec.nonce[:8], 16) < share * 2**32:
                raise RuntimeError("injected by the load test")
            return stock(recorder, segment)

        Recorder._finish = finish  # type: ignore[method-assign]
