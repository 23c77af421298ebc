"""Attribution of whole files on Ray Data: ``vllm-flashtrace batch`` and ``flashtrace_dataset``.

Only the modules that run a batch import Ray, when they are used; reading, checking, storing and
merging rows need no Ray and no engine.
"""
