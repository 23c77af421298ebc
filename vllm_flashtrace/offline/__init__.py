"""Attribution without a server, on vLLM's ``LLM``."""
