"""An agent's conversation: which message did its last tool call get an argument from?

What one sees: each message's share of the argument, without and with hops through the assistant's
own earlier turns. The value stands in one tool message, and in an assistant turn that repeated it.
The program starts a small model itself, so it needs no server. That model would not make these
calls; what is attributed is a given call.

    python examples/agent_conversation.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VALUE = "DE89 3704 0044 0532 0130 00"
SOURCE = 5  # The tool message that VALUE was copied from.
RESTATED = 6  # The assistant turn that repeated it.
TARGET = {"tool_call": 0, "argument": "iban"}


def _call(number: int, name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def _calls(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def _result(number: int, **content: Any) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": f"call{number:05}",
        "content": json.dumps(content),
    }


MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a bookkeeper. Use the tools, one call at a time."},
    {"role": "user", "content": "Pay the open invoice of Baker & Sons, please."},
    _calls(_call(1, "find_invoice", supplier="Baker & Sons")),
    _result(1, invoice="INV-2093", supplier_id="S-77", amount=418.5, due="2026-03-31"),
    _calls(_call(2, "get_supplier", supplier_id="S-77")),
    _result(2, supplier_id="S-77", city="Leeds", iban=VALUE, contact="A. Baker"),
    _calls(
        _call(3, "get_balance", account="main"),
        content=f"The money goes to {VALUE}. Let me see whether there is enough.",
    ),
    _result(3, account="main", balance=12000.75, currency="EUR"),
    {"role": "user", "content": "There is. Go ahead."},
]
COMPLETION = (
    '<tool_call>\n{"name": "pay", "arguments": {"amount": 418.5, "iban": "'
    + VALUE
    + '"}}\n</tool_call>'
)

CHAT_TEMPLATE = Path(__file__).with_name("tool_calls.jinja").read_text()


def scores(data: Mapping[str, Any]) -> dict[int | str, float]:
    """Each message's share of all information flow, by its index; ``"template"`` for the rest.

    Args:
        data: An attribution object that includes ``segments``.
    """
    return {segment.get("message", "template"): segment["score"] for segment in data["segments"]}


def attribute(flashtrace: Any, **options: Any) -> dict[str, Any]:
    """Attributes the argument.

    Args:
        flashtrace: A ``FlashTrace`` with ``CHAT_TEMPLATE`` and the ``hermes`` tool call parser.
        **options: Further keys of the request field.
    """
    field = {"target": TARGET, "include": ["segments"], **options}
    attribution = flashtrace.attribute(MESSAGES, COMPLETION, flashtrace=field)
    data: dict[str, Any] = attribution.to_dict()
    return data


def print_table(title: str, data: Mapping[str, Any]) -> None:
    """Prints what each message contributed, the largest share first."""
    print(f"\n{title}")
    for message, score in sorted(scores(data).items(), key=lambda item: -item[1]):
        role = said = ""
        if isinstance(message, int):
            role = MESSAGES[message]["role"]
            said = MESSAGES[message]["content"] or str(MESSAGES[message]["tool_calls"])
        print(f"  {score:6.1%}  {message:>8}  {role:9}  {said[:70]}")
    print(f"  {data['remaining_mass']:6.1%}  not followed further")
    print(f"  {data['target_mass']:6.1%}  on the call itself")
    print(f"  {data['skipped_mass']:6.1%}  on punctuation")


def main() -> None:
    """Attributes the argument without and with hops, and prints both tables."""
    from vllm_flashtrace import FlashTrace
    from vllm_flashtrace.models import prepare_smollm2

    with FlashTrace(
        str(prepare_smollm2()),
        chat_template=CHAT_TEMPLATE,
        tool_call_parser="hermes",
        dtype="float32",
        max_model_len=2048,
        enforce_eager=True,
    ) as flashtrace:
        print_table("Without a hop", attribute(flashtrace, hops=0))
        data = attribute(flashtrace, recurse_over="assistant")
        print_table("With hops through the assistant's turns", data)
        print(f"\nThe argument {data['target']['text']!r} was copied from message {SOURCE}.")


if __name__ == "__main__":
    main()
