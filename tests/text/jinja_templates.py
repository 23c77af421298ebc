"""Chat templates as plain functions, without a tokenizer around them."""

from __future__ import annotations

import json
from collections.abc import Callable

import jinja2


def template(source: str) -> Callable[..., str]:
    environment = jinja2.Environment()
    # As in chat templates: no escaping for HTML, and none of characters outside ASCII.
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(source)
    return lambda messages, **options: compiled.render(messages=messages, **options)
