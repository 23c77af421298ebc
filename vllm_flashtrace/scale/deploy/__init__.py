"""``vllm-flashtrace deploy``: replicas of the server behind Ray Serve.

A request comes to Serve's HTTP proxy, which hands it to a gateway; the gateway hands it to one of
the engine replicas, each of which is vLLM's own application with its engine, and sends on what that
answers. A trace runs inside the replica that made the completion. Deferred attributions are kept by
one actor for all replicas.
"""
