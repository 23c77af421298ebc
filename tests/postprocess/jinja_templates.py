"""Chat templates as plain functions, without a tokenizer around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jinja2


def template(source: str) -> Callable[[Any], str]:
    environment = jinja2.Environment()
    # As in chat templates: no escaping for HTML, and none of characters outside ASCII.
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(source)
    return lambda messages: compiled.render(messages=messages)
