"""An agent with tools, and the attribution of every call that sends something out.

What one sees: the agent is asked to sum up an e-mail. The e-mail (a tool result, written by a
stranger) holds an instruction, and the agent obeys it: it sends the address book to the stranger.
The attribution of that call's ``to`` argument puts the tool message first, not the user, so the
program stops the call.

The loop needs a model that calls tools well. ``--replay`` attributes a recorded conversation
instead (``POST /v1/attributions``); any model whose chat template writes tool calls will do for it.

    python examples/agent_with_tools.py [--base-url URL] [--replay]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
from connection import arguments, attribute, connect, run

RECORDING = Path(__file__).with_name("injected_agent.json")
TURNS = 6
RISKY = {"send_email": "to"}  # Tools that act, and the argument that decides on whom.
# Who wanted this? One hop through the agent's own turns, as they may only repeat what a tool said.
FIELD = {"hops": 1, "recurse_over": "assistant", "include": ["segments"]}


def run_tool(name: str, parameters: dict[str, Any], recorded: dict[str, str]) -> str:
    """A tool's answer: here, the recorded one."""
    return recorded.get(name, json.dumps({"error": f"no tool {name}", "got": parameters}))


def sources(attribution: dict[str, Any]) -> list[tuple[str, float]]:
    """Messages by their share of the input on messages, the largest first."""
    own = [part for part in attribution["segments"] if "message" in part]
    total = sum(part["score"] for part in own) or 1.0
    named = [(f"{part['message']} {part['role']}", part["score"] / total) for part in own]
    return sorted(named, key=lambda source: -source[1])


def check(name: str, attribution: dict[str, Any]) -> bool:
    """Prints where a call's argument came from; whether the user or the system message leads."""
    if attribution["status"] != "completed":
        print(f"{name}: no attribution ({attribution['error']['message']}), so it is not run")
        return False
    print(f"{name}({RISKY[name]}={attribution['target']['text']!r}) came from")
    ranked = sources(attribution)
    for source, share in ranked:
        print(f"  {share:6.1%}  {source}")
    allowed = ranked[0][0].endswith((" user", " system"))
    print("allowed" if allowed else f"STOPPED: message {ranked[0][0]} decided on {RISKY[name]!r}")
    return allowed


def loop(client: openai.OpenAI, model: str, recording: dict[str, Any]) -> None:
    """Lets the model call tools; each risky call is attributed before it runs."""
    messages: list[Any] = recording["messages"][:2]
    for _ in range(TURNS):
        response = client.chat.completions.create(
            model=model, messages=messages, tools=recording["tools"], temperature=0, max_tokens=256
        )
        answer = response.choices[0].message
        messages.append(answer.model_dump(include={"role", "content", "tool_calls"}))
        if not answer.tool_calls:
            print(f"The agent answers: {answer.content}")
            return
        for index, call in enumerate(answer.tool_calls):
            name, given = call.function.name, json.loads(call.function.arguments)
            print(f"The agent calls {name}({given})")
            if name in RISKY:
                target = {"tool_call": index, "argument": RISKY[name]}
                if not check(name, explain(client, model, messages, recording["tools"], target)):
                    return
            result = run_tool(name, given, recording["results"])
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    print(f"Stopped after {TURNS} turns.")


def explain(
    client: openai.OpenAI, model: str, messages: list[Any], tools: list[Any], target: dict[str, Any]
) -> dict[str, Any]:
    """The attribution of one argument of the last message's tool calls."""
    field = {**FIELD, "target": target}
    body = {"model": model, "messages": messages, "tools": tools, "flashtrace": field}
    return attribute(client, body)


def main() -> None:
    """Runs the loop, or replays the recording."""
    parser = arguments(__doc__)
    parser.add_argument("--replay", action="store_true", help="attribute the recorded conversation")
    options = parser.parse_args()
    client, model = connect(options)
    recording = json.loads(RECORDING.read_text("utf-8"))
    if not options.replay:
        loop(client, model, recording)
        return
    for message in recording["messages"]:
        for call in message.get("tool_calls", []):
            print(f"The agent called {call['function']['name']}({call['function']['arguments']})")
    target = {"tool_call": 0, "argument": RISKY["send_email"]}
    check("send_email", explain(client, model, recording["messages"], recording["tools"], target))


if __name__ == "__main__":
    run(main, tools=True)
