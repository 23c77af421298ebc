"""Drives traces through an engine, hop by hop: specs, reports, admission, metrics.

- `tracer` runs attributions on an asynchronous engine: `admission` gives them a place and, within
  `budget`, their memory; `hop` and `scoring` make engine requests, `pickup` gets their results.
- `wire` is what both sides say to each other, `config` the options of both; `engines` tells
  engines apart, `multimodal` hands on images.
- `observation` tells operators, by `metrics` among others; `large_results` bounds what waits.
"""
