"""Inside vLLM's API server: the field on its routes, and our own routes.

- How it gets there: `launcher` starts vLLM's own server, `endpoint` puts us into it; `engine_app`
  is the same application without a socket.
- vLLM's routes: `openai`, `responses`, `messages` with `anthropic_documents`, `cohere_chat` with
  `citation_forms`; `traced_handler` and `streams` are what they share.
- Our routes: `attributions` with `existing_text`, `status`, `page`.
- Behind a route: `session` runs a request's traces, `recording_client` notes what the engine got
  and gave, `rendering` lends vLLM's renderer and parsers, `http_errors` words refusals.
- Results that stay: `deferred`, in memory or in `sqlite_store`; `large_objects` sends them.
"""
