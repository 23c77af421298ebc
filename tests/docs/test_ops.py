"""Dashboard, alerts and Dockerfile name what exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server.scripted_app import build
from vllm_flashtrace.base.logs import CLIENT_CODES

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "ops" / "prometheus-alerts.yml"
DASHBOARD = json.loads((ROOT / "ops" / "grafana-dashboard.json").read_text("utf-8"))
RULES = [
    rule for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"] for rule in group["rules"]
]
# Labels that Prometheus and its functions make; no exporter has them.
_NAME = re.compile(r"flashtrace_\w+")
_SELECTOR = re.compile(r"(flashtrace_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\bby\s*\(([^)]*)\)")

Metrics = dict[str, dict[str, set[str]]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def metrics(smollm2_folder: Path) -> AsyncIterator[Metrics]:
    """Our samples at a real ``/metrics``, after an attribution that succeeds and one that fails:
    the values of each label, by name of the sample."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "flashtrace")
        app = await build(str(smollm2_folder))
        await app.chat(flashtrace=True)
        await app.chat(flashtrace={"target": {"text": "nowhere"}})
        page = (await app.client.get("/metrics")).text
        await app.client.aclose()
    found: Metrics = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith("flashtrace_"):
                labels = found.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
    yield found


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if "definition" in variable:
            yield variable["definition"]
    for rule in RULES:
        yield rule["expr"]


async def test_every_metric_and_label_exists(metrics: Metrics) -> None:
    for expression in expressions():
        named = set(_NAME.findall(expression))
        assert named, expression
        assert named <= metrics.keys(), expression
        for name, matchers in _SELECTOR.findall(expression):
            labels = {label for label, _, _ in _MATCHER.findall(matchers)}
            assert labels <= metrics[name].keys(), expression
        for grouping in _GROUPING.findall(expression):
            labels = {label.strip() for label in grouping.split(",")}
            for name in named:
                assert labels <= metrics[name].keys(), (expression, name)


async def test_values_of_labels_exist(metrics: Metrics) -> None:
    """Phases are those of the page; statuses and codes are those that the package gives."""
    source = "".join(
        path.read_text("utf-8")
        for folder in ("vllm_flashtrace", "patches")
        for path in (ROOT / folder).rglob("*.py")
    )
    for expression in expressions():
        for name, matchers in _SELECTOR.findall(expression):
            for label, _, pattern in _MATCHER.findall(matchers):
                if label == "model_name":
                    continue
                for value in pattern.split("|"):
                    known = value in metrics[name][label] or f'"{value}"' in source
                    assert known, f"{label}={value} in {expression}"


async def test_failing_leaves_out_what_a_client_explains() -> None:
    [rule] = [rule for rule in RULES if rule["alert"] == "FlashTraceFailing"]
    [left_out] = re.findall(r'code!~"([^"]+)"', rule["expr"])
    assert set(left_out.split("|")) == CLIENT_CODES


async def test_every_metric_is_on_the_dashboard(metrics: Metrics) -> None:
    shown = "".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    families = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in metrics}
    assert {family for family in families if family not in shown} == set()


async def test_dashboard_is_well_formed() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
    assert used == variables
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, f"{panel['title']} lies over another panel"
        assert max(x for x, _ in own) < 24
        cells |= own


async def test_alerts_are_well_formed() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"[A-Z]\w+", rule["alert"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        expression = rule["expr"]
        assert all(expression.count(a) == expression.count(b) for a, b in ("()", "[]", "{}"))
        # What a text names must survive the aggregation.
        grouped = set(re.split(r"[,\s]+", ",".join(_GROUPING.findall(expression))))
        named = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        assert named <= grouped, rule["alert"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
async def test_promtool_accepts_the_alerts() -> None:
    subprocess.run(["promtool", "check", "rules", ALERTS], check=True, timeout=60)


async def test_dockerfile_builds_on_the_pinned_vllm() -> None:
    lines = [
        line.split(maxsplit=1)
        for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    instructions: dict[str, list[str]] = {}
    for word, rest in lines:
        instructions.setdefault(word, []).append(rest)
    assert set(instructions) <= {"FROM", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"}
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    [pinned] = project["optional-dependencies"]["cuda"]
    images = {source.split()[0] for source in instructions["FROM"]}
    assert images == {f"vllm/vllm-openai:v{pinned.removeprefix('vllm==')}"}
    assert json.loads(instructions["ENTRYPOINT"][0]) == ["vllm-flashtrace", "serve"]
    assert "vllm-flashtrace" in project["scripts"]
    copied = [rest.split() for rest in instructions["COPY"] if not rest.startswith("--from")]
    allowed = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for *sources, _ in copied:
        for source in sources:
            assert (ROOT / source).exists()
            assert f"!{source}" in allowed
