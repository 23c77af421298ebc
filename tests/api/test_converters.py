"""An attribution in other tools' forms, read by the tools themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider

from tests.api.samples import response
from vllm_flashtrace import Attribution, TraceError
from vllm_flashtrace.api.converters import measures
from vllm_flashtrace.api.response import AttributionObject, TokenScore

ID = f"ft-{7:032x}"
OWN = [("What", 1.0), (" code", 3.0), ("?", 0.0), ("\n", 0.0), ("7306", 4.0), ("\n", 0.0)]
OTHER = [("What", 4.0), (" code", 0.0), ("?", 3.0), ("\n", 0.0), ("7306", 1.0), ("\n", 0.0)]
MASSES = {"input_mass": 0.8, "remaining_mass": 0.05, "target_mass": 0.15, "skipped_mass": 0.0}
HOPS = [
    {"hop": 0, "input_mass": 0.6, "reasoning_mass": 0.25, "target_mass": 0.15, "skipped_mass": 0.0},
    {"hop": 1, "input_mass": 0.8, "reasoning_mass": 0.2, "target_mass": 0.0, "skipped_mass": 0.0},
]
SEGMENTS = [
    {"message": 0, "role": "user", "name": "my secret", "score": 0.64},
    {"message": 1, "role": "secret role", "score": 0.0},
    {"role": "template", "score": 0.16},
]
SOURCES = [
    {"index": 0, "id": "a secret", "kind": "document", "tokens": 0, "score": None, "mean": None},
    {"index": 1, "id": "b", "kind": "marked", "message": 0, "tokens": 2, "score": 0.5, "mean": 0.2},
]
RESULT_KEYS = ("target", "scores", "hops", "segments", "sources", *MASSES)


def single(own: list[tuple[str, float]] = OWN, **extra: Any) -> Attribution:
    data = response(own, tokens=False, id=ID, hops=HOPS, **MASSES)
    data["prompt_tokens"] = len(data["scores"])
    AttributionObject.model_validate(data := {**data, **extra})
    return Attribution(data, text="It is 7306.")


def several() -> Attribution:
    """Two targets with the same prompt and scores of their own."""
    sources = [{**source, "sentences": []} for source in SOURCES]
    first = single(segments=SEGMENTS, sources=sources).to_dict()
    second = single(OTHER).to_dict()
    second["target"] = {"text": "It", "tokens": [[0, 1]]}
    parts = [{key: part[key] for key in RESULT_KEYS if key in part} for part in (first, second)]
    shared = {key: first[key] for key in first if key not in (*RESULT_KEYS, "text")}
    return Attribution({**shared, "targets": parts}, text="It is 7306.")


def columns(attribution: Attribution) -> list[list[float]]:
    return [[score.score for score in part.scores] for part in attribution.targets]


class TestDataFrame:
    def test_a_row_for_each_returned_score(self) -> None:
        attribution = single()
        frame = attribution.to_dataframe()
        assert list(frame.columns) == list(TokenScore.model_fields)
        assert frame["score"].tolist() == columns(attribution)[0]
        assert frame["token"].tolist() == [score.token for score in attribution.scores]
        located = frame[frame["message"] == 0]
        assert located["token"].tolist() == [token for token, _ in OWN]
        assert located["start"].tolist() == [0, 4, 9, 10, 11, 15]
        assert frame["start"].isna().sum() == len(frame) - len(OWN)
        assert {str(frame[name].dtype) for name in ("message", "part", "start")} == {"Int64"}
        best = Attribution(attribution.to_dict() | {"scores": [], "prompt_tokens": 0})
        assert best.to_dataframe().empty

    def test_several_targets_have_a_column(self) -> None:
        frame = several().to_dataframe()
        assert frame.columns[0] == "target"
        for index, scores in enumerate(columns(several())):
            assert frame[frame["target"] == index]["score"].tolist() == scores


class TestCaptum:
    def test_one_target_is_one_row(self) -> None:
        attribution = single()
        result = attribution.to_captum()
        assert result.output_tokens == ["7306"]
        assert result.input_tokens == [score.token for score in attribution.scores]
        assert result.seq_attr.tolist() == pytest.approx(columns(attribution)[0])
        assert result.token_attr.tolist() == [result.seq_attr.tolist()]

    def test_the_best_tokens_of_several_targets_stay_in_order(self) -> None:
        pyplot = pytest.importorskip("matplotlib.pyplot")
        pyplot.switch_backend("agg")
        result = several().to_captum(top_k=3)
        assert result.input_tokens == ["<|start|>", "What", "7306"]
        kept = [[row[i] for i in (0, 3, 7)] for row in columns(several())]
        assert result.token_attr.tolist() == [pytest.approx(row) for row in kept]
        means = [sum(pair) / 2 for pair in zip(*kept, strict=True)]
        assert result.seq_attr.tolist() == pytest.approx(means)
        figure, axes = result.plot_token_attr()
        assert [label.get_text() for label in axes.get_xticklabels()] == result.input_tokens
        assert [label.get_text() for label in axes.get_yticklabels()] == ["7306", "It"]
        assert f"{kept[0][2]:.4f}" in {text.get_text() for text in axes.texts}
        pyplot.close(figure)

    def test_top_k_is_at_least_one(self) -> None:
        with pytest.raises(ValueError, match="at least 1, got 0"):
            single().to_captum(top_k=0)


def test_inseq_shows_saves_and_loads(tmp_path: Path) -> None:
    inseq = pytest.importorskip("inseq")
    attribution = several()
    output = attribution.to_inseq()
    [sequence] = output
    assert sequence.source_attributions.T.tolist() == [
        pytest.approx(scores) for scores in columns(attribution)
    ]
    assert {name: values.tolist() for name, values in sequence.step_scores.items()} == {
        name: pytest.approx([value, value]) for name, value in MASSES.items()
    }
    shown = output.show(display=False, return_html=True)
    assert all(f"<th>{word}</th>" in shown for word in ("What", "7306", "It"))
    assert f">{round(max(columns(attribution)[0]), 3)}</th>" in shown
    output.save(tmp_path / "output.json")
    again = inseq.FeatureAttributionOutput.load(tmp_path / "output.json")
    assert again == output
    assert [token.id for token in again[0].source] == [row.token_id for row in single().scores]
    output.save(tmp_path / "parts.json", split_sequences=True)
    # Tokens without a score that a cut-off answer lacks have none for the other target either.
    data = attribution.to_dict()
    for part in data["targets"]:
        part["scores"] = [row for row in part["scores"] if row["score"] > 0]
    [cut] = Attribution(data).to_inseq()
    assert [token.token for token in cut.source] == ["<|start|>", "What", " code", "?", "7306"]
    assert cut.source_attributions[3, 0] == 0 < cut.source_attributions[3, 1]


class TestMeasures:
    def test_masses_come_first_and_names_quote_nobody(self) -> None:
        found = list(measures(several().to_dict()))
        assert [(m.name, m.value, m.place) for m in found] == [
            *(
                (f"flashtrace.{name}", value, {"target": target})
                for name, value in MASSES.items()
                for target in (0, 1)
            ),
            ("flashtrace.source.marked", 0.5, {"target": 0, "source": 1, "message": 0}),
            ("flashtrace.segment.user", 0.64, {"target": 0, "message": 0}),
            ("flashtrace.segment.other", 0.0, {"target": 0, "message": 1}),
            ("flashtrace.segment.template", 0.16, {"target": 0}),
        ]
        assert found[-4].texts == {"target_text": "7306", "source_id": "b"}
        assert found[-3].texts == {"target_text": "7306", "role": "user", "name": "my secret"}

    def test_keys_are_those_of_each_target_alone(self) -> None:
        attribution = several()
        keys = [measure.key for measure in measures(attribution.to_dict())]
        assert len(set(keys)) == len(keys)
        alone = [m.key for part in attribution.targets for m in measures(part.to_dict())]
        assert sorted(alone) == sorted(keys)

    def test_langfuse_takes_the_scores(self) -> None:
        langfuse = pytest.importorskip("langfuse")
        sent: list[dict[str, Any]] = []

        def answer(request: httpx.Request) -> httpx.Response:
            assert request.url.path == "/api/public/scores"
            sent.extend(json.loads(request.content))
            return httpx.Response(207, json={"successes": [], "errors": []})

        client = langfuse.Langfuse(
            public_key="pk-test",
            secret_key="sk-test",
            base_url="http://127.0.0.1:9",
            httpx_client=httpx.Client(transport=httpx.MockTransport(answer)),
            tracer_provider=TracerProvider(),  # Its own would be that of the whole process.
        )
        scores = single(segments=SEGMENTS).to_langfuse(f"{1:032x}", f"{2:016x}")
        for score in scores:
            client.create_score(**score)
        client.shutdown()
        assert len(sent) == len(MASSES) + len(SEGMENTS)
        for body, score in zip(sent, scores, strict=True):
            assert body["id"] == score["score_id"]
            assert (body["traceId"], body["observationId"]) == (f"{1:032x}", f"{2:016x}")
            assert (body["name"], body["value"]) == (score["name"], score["value"])
            assert (body["dataType"], body["comment"]) == ("NUMERIC", score["comment"])
            assert body["metadata"] == score["metadata"]
        elsewhere = single(segments=SEGMENTS).to_langfuse(f"{3:032x}")
        ids = {score["score_id"] for score in (*scores, *elsewhere)}
        assert len(ids) == 2 * len(scores)
        assert single(segments=SEGMENTS).to_langfuse(f"{3:032x}") == elsewhere
        assert scores[4]["metadata"] == {
            "attribution_id": ID,
            "message": 0,
            "target_text": "7306",
            "role": "user",
            "name": "my secret",
        }

    def test_phoenix_takes_the_annotations(self) -> None:
        phoenix = pytest.importorskip("phoenix.client")
        from phoenix.client.__generated__.v1 import AnnotationResult, SpanAnnotationData

        sent: list[dict[str, Any]] = []

        def answer(request: httpx.Request) -> httpx.Response:
            assert request.url.path == "/v1/span_annotations"
            sent.extend(json.loads(request.content)["data"])
            return httpx.Response(200, json={"data": [{"id": str(i)} for i in range(len(sent))]})

        annotations = several().to_phoenix(f"{2:016x}")
        transport = httpx.MockTransport(answer)
        http = httpx.Client(transport=transport, base_url="http://127.0.0.1:9")
        inserted = phoenix.Client(http_client=http).spans.log_span_annotations(
            span_annotations=annotations, sync=True
        )
        assert sent == annotations
        assert len(inserted) == len(annotations)
        assert annotations[0].keys() == SpanAnnotationData.__annotations__.keys()
        assert annotations[0]["result"].keys() < AnnotationResult.__annotations__.keys()
        assert annotations[0]["result"]["score"] == MASSES["input_mass"]
        assert len({annotation["identifier"] for annotation in annotations}) == len(annotations)

    def test_opentelemetry_takes_the_events(self) -> None:
        with TracerProvider().get_tracer("client").start_as_current_span("chat") as span:
            for attributes in several().to_opentelemetry("chatcmpl-1"):
                span.add_event("gen_ai.evaluation.result", attributes)
        assert dict(span.events[9].attributes) == {
            "gen_ai.evaluation.name": "flashtrace.segment.user",
            "gen_ai.evaluation.score.value": 0.64,
            "gen_ai.evaluation.explanation": "Share of the target's information flow that came "
            "from this part of the prompt.",
            "gen_ai.response.id": "chatcmpl-1",
            "flashtrace.id": ID,
            "flashtrace.target": 0,
            "flashtrace.message": 0,
        }
        assert len(span.events) == 2 * len(MASSES) + 1 + len(SEGMENTS)
        assert "secret" not in span.to_json()
        assert "gen_ai.response.id" not in single().to_opentelemetry()[0]


CONVERTERS = {
    "to_dataframe": (),
    "to_inseq": (),
    "to_captum": (),
    "to_langfuse": ("trace",),
    "to_phoenix": ("span",),
    "to_opentelemetry": (),
}


def test_a_failed_trace_has_nothing_to_convert() -> None:
    error = {"code": "timeout", "message": "took too long"}
    failed = Attribution({"id": ID, "status": "failed", "error": error})
    for name, arguments in CONVERTERS.items():
        with pytest.raises(TraceError, match="took too long"):
            getattr(failed, name)(*arguments)


@pytest.mark.parametrize("name", ["to_inseq", "to_captum"])
def test_matrices_want_all_scores(name: str) -> None:
    data = several().to_dict()
    data["targets"][1]["scores"] = data["targets"][1]["scores"][:4]
    with pytest.raises(ValueError, match="top_k"):
        getattr(Attribution(data), name)()


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("to_dataframe", "pandas", "dataframe"),
        ("to_inseq", "inseq", "inseq"),
        ("to_captum", "captum", "captum"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'vllm-flashtrace\[{extra}\]'"):
        getattr(single(), name)()
