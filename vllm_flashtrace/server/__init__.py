"""Inside vLLM's API server: the field on its routes, and our own routes."""
