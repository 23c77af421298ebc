"""Everything that reads vLLM's private structures, apart from the modules in ``patches``."""
