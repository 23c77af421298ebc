"""The ``vllm-flashtrace`` command."""
