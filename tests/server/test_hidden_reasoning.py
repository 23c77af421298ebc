"""Reasoning through vLLM's own application, and what ``include_reasoning=false`` keeps back.

Whatever a client asks of the attribution, nothing in the answer may depend on the text of hidden
reasoning: two completions that differ only there get the same object.
"""

from __future__ import annotations

import json

import pytest
import pytest_asyncio

from tests.chat_templates import TEMPLATES
from tests.server.scripted_app import build
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

# As many tokens, none of them shared, in a tokenizer that knows little but letters.
SECRETS = ["Qzx vkw", "Jhb ygp"]
ANSWER = "The code is 4821."
TOOLS = [{"type": "function", "function": {"name": "pay", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "pay", "arguments": {"iban": "DE89"}}</tool_call>'
PARSERS = ["qwen3", "deepseek_r1"]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=PARSERS)
async def reasoning_app(request, plugins, tmp_path_factory):
    model = make_tiny_model("qwen3", tmp_path_factory.mktemp("tiny"))
    options = ["--reasoning-parser", request.param, "--enable-auto-tool-choice"]
    built = await build(str(model), *options, "--tool-call-parser", "hermes")
    yield built
    await built.client.aclose()


@pytest.fixture
def app(reasoning_app):
    reasoning_app.engine.reset()
    return reasoning_app


async def ask(app, text, field, **body):
    """The choice of a chat that generates ``text``."""
    app.engine.answers = [text]
    response = await app.chat(flashtrace=field, **body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        [choice] = response.json()["choices"]
        return choice["flashtrace"], response.text
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    deltas = [c["delta"] for e in events if e != "[DONE]" for c in json.loads(e)["choices"]]
    [trace] = [delta["flashtrace"] for delta in deltas if "flashtrace" in delta]
    return trace, response.text


async def test_output_is_what_follows_the_reasoning(app):
    trace, _ = await ask(app, f"<think>\nI look.\n</think>\n\n{ANSWER}", True)
    assert trace["target"]["text"] == ANSWER
    assert trace["hops"][0]["reasoning_mass"] > 0


async def test_interleaved_thinking_is_followed_in_every_block(app):
    text = f"<think>one</think>So.<think>two</think>{ANSWER}"
    trace, _ = await ask(app, text, {"preset": "paper", "include": ["generated"]})
    assert trace["target"]["text"] == ANSWER
    tokens = [row["token"] for row in trace["generated"]]
    one, two = tokens.index("<think>"), len(tokens) - 1 - tokens[::-1].index("<think>")
    thought = tokens.index("</think>") - one + tokens.index("</think>", two) - two - 2
    assert thought >= 2
    # The engine's scores are all alike: a mass counts its tokens.
    traced = trace["prompt_tokens"] + trace["target"]["tokens"][0][1]
    assert trace["hops"][0]["reasoning_mass"] == pytest.approx(thought / traced)


async def attribute(app, answer, **field):
    messages = [{"role": "user", "content": "What is the code?"}, {"role": "assistant", **answer}]
    response = await app.post("/v1/attributions", messages=messages, flashtrace=field)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("content", [ANSWER, f"{ANSWER} Wait."])
async def test_a_stored_answer_without_reasoning_has_none(app, content):
    """It is what the server itself sends back, in ``content`` alone."""
    found = await attribute(app, {"content": content}, hops=0)
    assert found["status"] == "completed"
    assert found["target"]["text"] == content
    assert found["hops"][0]["reasoning_mass"] == 0


async def test_a_stored_answer_may_be_the_text_as_generated(app):
    text = f"<think>\nI look.\n</think>\n\n{ANSWER}"
    found = await attribute(app, {"content": text}, hops=0)
    assert found["target"]["text"] == ANSWER
    assert found["hops"][0]["reasoning_mass"] > 0


@pytest.mark.parametrize("content", [None, "I pay."])
@pytest.mark.parametrize("parser", PARSERS)
async def test_a_stored_tool_call_has_no_reasoning_either(plugins, tmp_path, parser, content):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATES["qwen"])
    model = make_tiny_model("qwen3", tmp_path / "tiny")
    options = ["--reasoning-parser", parser, "--enable-auto-tool-choice"]
    options += ["--tool-call-parser", "hermes", "--chat-template", str(template)]
    app = await build(str(model), *options)
    function = {"name": "pay", "arguments": '{"iban": "DE89"}'}
    answer = {
        "content": content,
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }
    target = {"tool_call": 0, "argument": "iban"}
    found = await attribute(app, answer, hops=0, target=target)
    await app.client.aclose()
    assert found["status"] == "completed", found
    assert found["target"]["text"] == "DE89"


@pytest.mark.parametrize(
    "front", ["<think></think>", "<think>\n\n</think>\n\n", "<think>\n</think>\n</think>\n"]
)
async def test_reasoning_in_which_nothing_was_said_is_no_answer(app, front):
    stored = await attribute(app, {"content": front + ANSWER}, hops=0)
    assert stored["target"]["text"] == ANSWER
    trace, _ = await ask(app, front + ANSWER, {"hops": 0})
    assert trace["target"]["text"] == ANSWER


PROBES = [
    {},
    {"target": "generated"},
    {"target": {"tokens": [[0, 4]]}},
    {"target": {"tokens": [[1, 3], [9, 12]]}},
    {"target": {"weights": {"2": 1, "3": 0.5}}},
    {"target": {"text": "Qzx"}},
    {"target": {"text": "Q"}},
    {"target": {"regex": "Q[a-z]x"}},
    {"target": {"regex": "(?s)<think>(.).*"}},
    {"target": {"regex": "(?s)^(.).*"}},
    {"target": {"regex": "(?s)^.{7}(.*)"}},
    {"target": {"text": "<think>"}},
    {"reasoning": {"text": "Qzx"}},
    {"reasoning": {"text": "vkw"}, "target": "generated"},
    {"reasoning": {"text": "<think>"}},
    {"reasoning": {"tokens": [[1, 2]]}},
    {"reasoning": {"tokens": [[2, 3]]}, "target": "output"},
    {"reasoning": "none", "target": "output"},
    {"skip_tokens": ["Q", "z", "x"], "target": "generated"},
    {"skip_tokens": ["Q", "z", "x"], "target": {"tokens": [[1, 4]]}},
    {"skip_tokens": "punctuation", "target": {"tokens": [[0, 5]]}},
    {"skip_tokens": ["v"], "recurse_over": "generated", "hops": 2},
    {"recurse_over": "assistant", "hops": 2, "target": {"tokens": [[0, 20]]}},
    {"target": {"tokens": [[0, 900]]}},
    {"target": {"tool_call": 0}},
    {"target": {"tool_call": 0, "argument": "iban"}},
]


TEXTS = {
    "answer": "<think>{}</think>" + ANSWER,
    "call": "<think>{}</think>" + CALL,
    "never closed": "{}",
    "interleaved": "<think></think>So.<think>{}</think>" + ANSWER,
}


async def probe(app, text, options, **body):
    """What two completions that differ in their reasoning alone say to a probe."""
    field = {"include": ["hops", "generated", "segments", "tokens"], "top_k": None, **options}
    found = []
    for secret in SECRETS:
        trace, _ = await ask(app, text.replace("{}", secret), field, tools=TOOLS, **body)
        trace.pop("id")
        trace.get("usage", {}).pop("seconds", None)
        found.append(trace)
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", TEXTS)
async def test_nothing_tells_one_hidden_reasoning_from_another(app, text, stream):
    encode = app.engine.get_tokenizer().encode
    assert len({len(encode(TEXTS[text].replace("{}", secret))) for secret in SECRETS}) == 1
    for options in PROBES:
        first, second = await probe(
            app, TEXTS[text], options, include_reasoning=False, stream=stream
        )
        assert first == second, options
        if "Q" not in json.dumps(options):
            assert "Qz" not in json.dumps(first)


async def test_the_probes_do_tell_where_reasoning_is_shown(app):
    told = 0
    for options in PROBES:
        first, second = await probe(app, TEXTS["answer"], options)
        told += first != second
        # What fails for another reason than the text has nothing to tell.
        assert first != second or first["status"] == "failed", options
    assert told > len(PROBES) / 2


async def test_hidden_tokens_have_scores_but_neither_text_nor_id(app):
    field = {"include": ["generated"], "target": {"text": "4821"}, "hops": 0}
    trace, _ = await ask(app, TEXTS["answer"].replace("{}", "Qzx"), field, include_reasoning=False)
    assert trace["target"]["text"] == "4821"
    rows = trace["generated"]
    hidden = [row for row in rows if "token" not in row]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert len(hidden) == 5  # the tags and three letters
    assert all(set(row) == {"index", "score"} and row["score"] > 0 for row in hidden)
    assert "".join(row["token"] for row in rows if "token" in row).startswith(ANSWER)


async def test_tool_call_behind_hidden_reasoning_is_explained(app):
    field = {"target": {"tool_call": 0, "argument": "iban"}}
    trace, _ = await ask(
        app, TEXTS["call"].replace("{}", "Qzx"), field, tools=TOOLS, include_reasoning=False
    )
    assert trace["target"]["text"] == "DE89"
    assert trace["hops"][0]["reasoning_mass"] > 0
