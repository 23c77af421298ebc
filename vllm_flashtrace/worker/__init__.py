"""Inside a vLLM worker: records a trace while its request is prefilled."""
