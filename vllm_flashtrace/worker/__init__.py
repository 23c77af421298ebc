"""Inside a vLLM worker: records a trace while its request is prefilled.

- A step: `runner` meets vLLM's model runners, `recorder` keeps the traces, `step` records a step's
  target rows, `finish` makes scores of the sums. `log_probs` gives log-probabilities of tokens.
- What they work on: `recorded_trace`, a trace with its sums or its `kept_rows`; `step_rows`, where
  rows lie in a step and in the cache; `row_groups`, what is recorded in one call; `clock`.
- The end: `host_buffers` for what is copied behind the step, `reports` for what is made of it;
  `rank_agreement` is what ranks must do alike.
- A forward pass: `taps` on the residual stream, `observer` for these and for attention.
- The model: `traced_model`, with `cpu_model` and `gpu_model`, which read keys and values by
  `cpu_cache`, `gpu_cache` and, of latent attention, by `latents` and `gpu_latents`.
- What is read of it, or refused: `layers`, and of each `decoder_stream`, `output_projections`,
  `quantized` and `output_gates`; `cache_groups` of the KV cache, `config_checks` of the engine.
- At the start `start_proof` and `warm_up`; ever after `fingerprint`, which sees weights change.
"""
