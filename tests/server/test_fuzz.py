"""Generated requests: none is a server error, none hangs, none leaves anything behind.

``FLASHTRACE_FUZZ_SCALE`` multiplies their number, ``FLASHTRACE_FUZZ_SEED`` gives
other ones.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.fuzz_bodies import ATTRIBUTIONS, ROUTES, altered, broken, requests
from tests.server.fuzz_campaign import SCALE, Campaign
from tests.server.scripted_app import build
from vllm_flashtrace.api.request import FIELD
from vllm_flashtrace.server.page import ROUTE as PAGE
from vllm_flashtrace.server.sqlite_store import STORE_ENV

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
ONE = "/v1/attributions/{attribution_id}"
OPERATIONS = [
    # Path, method, whether its parameters can be wrong, number of requests.
    ("/v1/attributions", "POST", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], 50),
    (ONE, "GET", [GenerationMode.POSITIVE], 30),
    (ONE, "DELETE", [GenerationMode.POSITIVE], 30),
    ("/v1/attributions/status", "GET", [GenerationMode.POSITIVE], 1),
]
METHODS = ["GET", "DELETE", "POST", "PUT", "PATCH", "HEAD", "OPTIONS"]
PATHS = [
    *("/v1/attributions", "/v1/attributions/", "/v1/attributions/status", PAGE, f"{PAGE}/"),
    *(f"{PAGE}/app.js", f"{PAGE}/../schema.py", f"{PAGE}/%2e%2e/%2e%2e/schema.py"),
    *(f"{PAGE}//etc/passwd", f"{PAGE}/page/index.html", f"{PAGE}/app.js%00"),
]
IDS = [
    *("ft-" + "0" * 32, "ft-", "", "%00", "%ff", "%ED%A0%80", "..%2f..%2fetc%2fpasswd", "' OR 1=1"),
    *("ft-" + "A" * 32, "a" * 20_000, "%", "status/", "\u6f22\u5b57"),
]
# /v1/attributions has no streams.
FORMS = [(route, s) for route in ROUTES for s in (False, True) if not (s and route == ATTRIBUTIONS)]
PER_ROUTE = 130
BROKEN = 120
BESIDE = 20
WRONG_PATHS = 75
PASSED_ON = ("params", "json", "data", "headers", "cookies")
NOTHING_LEFT = {
    "unfinished": 0,
    "places": 0,
    "accumulator_bytes": 0,
    "reports": 0,
    "tasks": [],
}


@pytest.fixture(scope="module")
def campaign(
    plugins: None, model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Campaign]:
    """An application with all that it can have: the page, tool calls and reasoning."""
    ours = json.dumps({"flashtrace": {"page": True}})
    options = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        patch.setenv(STORE_ENV, str(tmp_path_factory.mktemp("fuzz") / "store"))
        app = runner.run(build(model_path, "--additional-config", ours, *options))
        made = Campaign(app, runner)
        yield made
        print(dict(made.bodies), dict(made.tally), made.slowest)
        runner.run(app.app.state.flashtrace.close())
        runner.run(app.client.aclose())


@pytest.fixture(autouse=True)
def nothing_is_left(campaign: Campaign) -> Iterator[None]:
    yield
    assert campaign.wait(campaign.leftovers()) == NOTHING_LEFT


@pytest.mark.parametrize(("route", "stream"), FORMS)
def test_any_field_on_any_route(campaign, route, stream):
    before = campaign.tally.copy()
    made = requests(route, stream)
    assert campaign.run(f"{route} {stream}", PER_ROUTE, made, campaign.send) >= PER_ROUTE * SCALE
    seen = campaign.tally - before
    # The usual ways a request can go have been gone, so that the checks above have held something.
    assert {"refused", "completed", "queued"} <= set(" ".join(seen).split()), seen
    assert seen["traces"] > seen["completed"] > 0


@pytest.mark.parametrize("route", ROUTES[:4])
def test_side_by_side(campaign, route):
    """With the field, what vLLM accepts is accepted and what it refuses is refused as it does."""
    statuses: Counter[int] = Counter()

    async def send(body: dict[str, Any]) -> None:
        found = []
        # A key that nobody knows, for vLLM says how many a body has.
        for key in ("unknown_key", FIELD):
            campaign.app.engine.reset()
            text = json.dumps({**body, key: {"hops": 0}})
            response = await campaign.request(
                "POST", route, content=text, headers={"content-type": "application/json"}
            )
            # Where in the whole answer a lone surrogate is, which vLLM echoes, is no difference.
            text = re.sub(r"in position \d+", "", response.text)
            refusal = None if response.status_code == 200 else text
            found.append((response.status_code, refusal))
        statuses[found[0][0]] += 1
        assert found[1] == found[0] or _is_of_the_field(body, found[1]), json.dumps(body)

    assert campaign.run(f"beside {route}", BESIDE, altered(route), send) >= BESIDE * SCALE
    assert statuses[200] > 0 < statuses[400], statuses


def _is_of_the_field(body: dict[str, Any], found: tuple[int, str | None]) -> bool:
    """Whether an answer says what cannot be combined with the field."""
    return found[0] == 400 and f"cannot be combined with {FIELD}" in str(found[1])


def test_broken_bodies_and_headers(campaign):
    assert campaign.run("broken", BROKEN, broken(), campaign.send) >= BROKEN * SCALE


@pytest.mark.parametrize(("path", "method", "modes", "examples"), OPERATIONS)
def test_our_routes_by_their_schema(campaign, path, method, modes, examples):
    document = campaign.wait(campaign.request("GET", "/openapi.json")).json()
    operation = schemathesis.openapi.from_dict(document)[path][method]

    async def send(case: Any) -> None:
        if modes[0] == case.meta.generation.mode and isinstance(case.body, dict):
            make_likelier(case.body)
        options = case.as_transport_kwargs(base_url="http://test")
        given = {name: options[name] for name in PASSED_ON if options.get(name) is not None}
        if isinstance(given.get("data"), (bytes, str)):
            given["content"] = given.pop("data")
        response = await campaign.request(method, options["url"], **given)
        case.validate_response(response, checks=CHECKS)
        campaign.tally[f"{method} {response.status_code}"] += 1
        await campaign.settled()

    for mode in modes:
        made = operation.as_strategy(generation_mode=mode)
        sent = campaign.run(f"{path} {method} {mode}", examples, made, send)
        assert sent >= min(examples, examples * SCALE)


def make_likelier(body: dict[str, Any]) -> None:
    """Keeps one of the two forms of a body for the model that is there, so that it may be good."""
    text = ("prompt", "completion", "add_special_tokens")
    for name in body.keys() - {*text, FIELD} if "prompt" in body else text:
        body.pop(name, None)
    body["model"] = "m"
    if isinstance(body.get(FIELD), dict):
        for name in ("hops", "top_k", "target", "reasoning", "skip_tokens"):
            body[FIELD].pop(name, None)


def test_any_method_on_any_path(campaign):
    text = {"model": "m", "prompt": "Which?", "completion": "4821"}
    deferred = {**text, FIELD: {"mode": "deferred"}}
    asked = [campaign.request("POST", ATTRIBUTIONS, json=deferred) for _ in range(8)]
    live = [campaign.wait(request).json()["id"] for request in asked]
    paths = [*PATHS, *(f"{ATTRIBUTIONS}/{name}" for name in [*IDS, *live])]

    async def send(request: tuple[str, str]) -> None:
        method, path = request
        response = await campaign.request(method, path)
        assert response.status_code in (200, 307, 400, 404, 405), (method, path)
        assert "import annotations" not in response.text
        campaign.tally[f"{method} {response.status_code}"] += 1

    made = st.tuples(st.sampled_from(METHODS), st.sampled_from(paths))
    assert campaign.run("paths", WRONG_PATHS, made, send) > 0


def test_there_were_enough_bodies(campaign):
    bodies = {name: campaign.bodies[name] for name in [*(f"{r} {s}" for r, s in FORMS), "broken"]}
    if 0 in bodies.values():
        pytest.skip("only a part of the campaign was run")
    assert sum(bodies.values()) >= 800 * SCALE
    assert {"plain", "failed"} <= set(" ".join(campaign.tally).split()), campaign.tally
