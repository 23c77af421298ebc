"""Attribution of whole files on Ray Data: ``vllm-flashtrace batch`` and ``flashtrace_dataset``.

Invariant: only :mod:`vllm_flashtrace.batch.dataset` and its like import Ray, when they are used;
reading, checking, storing and merging rows need no Ray and no engine.
"""
