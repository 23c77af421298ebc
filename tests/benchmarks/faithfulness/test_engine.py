"""What of the faithfulness benchmark runs through the engine, on a tiny random model."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.faithfulness import own_answers, own_summary
from benchmarks.faithfulness.baselines import AblationFamily
from benchmarks.faithfulness.engine import EngineResource, EngineScorer
from benchmarks.faithfulness.example import (
    Example,
    Prepared,
    Scores,
    prepare,
)
from benchmarks.faithfulness.hf import HFModel
from benchmarks.faithfulness.ours import VARIANTS, OursFamily
from benchmarks.faithfulness.own_answers import OwnResources
from benchmarks.faithfulness.own_methods import attention_by_sentence, logit_directions
from benchmarks.faithfulness.paraphrased import make_question
from benchmarks.faithfulness.run import WorkFile
from tests import engine_starts, heap
from tests.cores import MULTIPROCESSING, own_core
from tests.tiny_models import make_tiny_model

LONGEST = 640
CHUNK = 256


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Threads that spin for each other make tiny models slow where other tests run too."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {own_core()})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[EngineResource]:
    """Eager and in this process, to start sooner, with steps shorter than the longest sequence."""
    engine_starts.note("the faithfulness benchmark's own, with short steps (in this process)")
    heap.leave_out_what_is_there()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MULTIPROCESSING, "0")
        resource = EngineResource(
            folder,
            max_model_len=LONGEST,
            enforce_eager=True,
            max_num_batched_tokens=CHUNK,
            kv_cache_memory_bytes=64 << 20,
            distributed_executor_backend="uni",
        )
    yield resource
    resource.close()


@pytest.fixture(scope="module")
def hf(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prepared(engine: EngineResource) -> Prepared:
    example = Example(
        id="lighthouse",
        task="test",
        length=0,
        prompt="The secret number of the northern lighthouse is 4821. She counted 12 apples, 7 "
        "pears and 30 plums. What is the secret number?",
        reasoning="Let me think about that again. The lighthouse is the northern one, so it is ",
        output="4821.",
    )
    return prepare(example, engine.ft.llm.get_tokenizer())


@pytest.fixture(scope="module")
def ours(engine: EngineResource) -> OursFamily:
    return OursFamily(SimpleNamespace(engine=engine))


@pytest.fixture(scope="module")
def all_scores(ours: OursFamily, prepared: Prepared) -> dict[str, Scores]:
    return ours.attribute(prepared, list(VARIANTS))


@torch.no_grad()
def reference(model: Any, tokens: Sequence[int], response: int) -> float:
    logs = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    rows = range(len(tokens) - response, len(tokens))
    return sum(float(logs[row - 1, tokens[row]]) for row in rows)


def random_tokens(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, length).tolist()


def changed(tokens: Sequence[int], *positions: int) -> list[int]:
    copy = list(tokens)
    for position in positions:
        copy[position] = 0
    return copy


def test_scorer_equals_hugging_face(engine: EngineResource, hf: Any) -> None:
    """Lengths around block borders, a long one in chunks, and prefixes shared in every way."""
    sequences, lengths = [], []
    for seed, (length, response) in enumerate([(2, 1), (33, 1), (64, 31), (96, 32), (97, 60)]):
        sequences.append(random_tokens(length, seed))
        lengths.append(response)
    long = random_tokens(LONGEST, 9)
    for tokens, response in [
        (long, 70),
        (changed(long, 500), 70),
        (changed(long, 100, 500), 70),
        (changed(long, 3), 1),
        (long, 300),
    ]:
        sequences.append(tokens)
        lengths.append(response)
    found = engine.scorer.response_logprobs(sequences, lengths)
    for tokens, response, value in zip(sequences, lengths, found, strict=True):
        assert value == pytest.approx(reference(hf, tokens, response), rel=1e-5, abs=1e-3)


def test_scorer_never_counts_cached_rows(engine: EngineResource, hf: Any) -> None:
    """The whole sequence is in the prefix cache already, response and all."""
    tokens = random_tokens(300, 20)
    expected = reference(hf, tokens, 200)
    for _ in range(2):
        fresh = EngineScorer(engine.ft.llm)  # One that does not know the result.
        assert fresh.response_logprobs([tokens], [200])[0] == pytest.approx(expected, abs=1e-3)
        assert fresh.response_logprobs([tokens[:200]], [100])[0] == pytest.approx(
            reference(hf, tokens[:200], 100), abs=1e-3
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flashtrace-k0", {"hops": 0}),
        ("flashtrace-k1", {"hops": 1}),
        ("flashtrace-auto", {"hops": "auto"}),
        ("flashtrace-k1-skip", {"hops": 1, "skip_tokens": "punctuation"}),
    ],
)
def test_nested_hops_equal_the_products_own(
    engine: EngineResource,
    prepared: Prepared,
    all_scores: dict[str, Scores],
    name: str,
    options: dict[str, Any],
) -> None:
    answer = attribute(engine, prepared, prepared.target, options)
    user = slice(*prepared.user)
    expected = np.array([token.score for token in answer.scores])[user]
    found = all_scores[name]
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-7)
    assert found.facts["hops"] == len(answer.hops) - 1
    assert found.facts["reasoning_mass"] == pytest.approx(answer.hops[0]["reasoning_mass"])
    assert found.facts["remaining_mass"] == pytest.approx(answer.to_dict()["remaining_mass"])


def test_predicting_rows_are_one_to_the_left(
    engine: EngineResource, prepared: Prepared, all_scores: dict[str, Scores]
) -> None:
    rows = (prepared.target[0] - 1, prepared.target[1] - 1)
    answer = attribute(engine, prepared, rows, {"hops": 1})
    expected = np.array([token.score for token in answer.scores])[slice(*prepared.user)]
    found = all_scores["flashtrace-k1-predicting"].values
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert not np.allclose(found, all_scores["flashtrace-k1"].values, rtol=1e-2)


def test_closures_add_the_geometric_tail(
    ours: OursFamily, prepared: Prepared, all_scores: dict[str, Scores]
) -> None:
    run = ours.run_hops(prepared, [VARIANTS["flashtrace-k3"][0]], "closures")
    rho = [mass.reasoning_mass for mass in run.masses]
    assert all(0.01 < value < 0.99 for value in rho)
    for hops in (1, 2):
        total = sum(np.prod(rho[:k]) * run.scores[k] for k in range(hops + 1))
        tail = sum(np.prod(rho[: hops + 1]) * rho[hops] ** m * run.scores[hops] for m in range(999))
        found = all_scores[f"flashtrace-k{hops}-closure"]
        np.testing.assert_allclose(found.values, total + tail, rtol=1e-4, atol=1e-8)
        assert found.facts["remaining_mass"] == 0.0


def test_leave_one_out_equals_hugging_face(
    engine: EngineResource, hf: Any, prepared: Prepared
) -> None:
    ablation = AblationFamily(SimpleNamespace(engine=engine, seed=0))
    scores = ablation.attribute(prepared, ["loo-token", "loo-sentence", "contextcite"])
    tokens, response = prepared.token_ids, prepared.response_length
    whole = reference(hf, tokens, response)
    for position in range(*prepared.user):
        loss = whole - reference(hf, changed(tokens, position), response)
        found = scores["loo-token"].values[position - prepared.user[0]]
        assert found == pytest.approx(loss, abs=2e-3)
    first, end = prepared.sentences[1]
    loss = whole - reference(hf, changed(tokens, *range(first, end)), response)
    sentence = scores["loo-sentence"].values[first - prepared.user[0] : end - prepared.user[0]]
    np.testing.assert_allclose(sentence, loss / (end - first), atol=1e-3)
    assert np.isfinite(scores["contextcite"].values).all()


def attribute(
    engine: EngineResource, prepared: Prepared, rows: tuple[int, int], options: dict[str, Any]
) -> Any:
    start = prepared.prompt_length
    return engine.ft.attribute(
        prompt=list(prepared.token_ids[:start]),
        completion=list(prepared.token_ids[start:]),
        flashtrace={
            "target": {"tokens": [[row - start for row in rows]]},
            "reasoning": {"tokens": [[row - start for row in prepared.reasoning]]},
            "preset": "paper",
            "top_k": None,
            **options,
        },
    )


# ---- The model's own answers


@pytest.fixture(scope="module")
def hf_model(folder: Path) -> HFModel:
    return HFModel(folder)


def own_options(output: Path) -> argparse.Namespace:
    return argparse.Namespace(
        **{"tasks": ["digits", "code"], "wide": 3, "examples": 2, "left_out": 1, "ablated": 1},
        **{"offline": 1, "trained": 3, "sentences": 9, "seed": 0},
        **{"json": output, "model": None, "figure": None},
    )


def write_answers(path: Path, engine: EngineResource, folder: Path) -> None:
    """As if the model had given these answers; a random one gives none."""
    tokenizer = engine.ft.llm.get_tokenizer()
    config = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=8).hexdigest()
    fingerprint = {"model": config, "dtype": "float32", "seed": 0, "sentences": 9}
    work = WorkFile(path, fingerprint)
    for task in ("digits", "code"):
        for n in range(16):
            text = f"It is {make_question(task, n, 9, 0).answer}."
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            row = {
                "text": text,
                "token_ids": ids,
                "logprobs": [-0.5] * len(ids),
                "right": n % 4 > 0,
            }
            work.add({"kind": "answer", "example": f"{task}/{n}", **row})
    work.close()


def test_own_answers_are_explained_and_a_second_run_does_nothing(
    engine: EngineResource,
    hf: Any,
    hf_model: HFModel,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own_summary, "_FEWEST", 3)
    options = own_options(tmp_path / "own.json")
    work = options.json.with_suffix(".work.jsonl")
    write_answers(work, engine, folder)
    resources = OwnResources(folder)
    vars(resources).update(engine=engine, hf=hf_model)
    resources.close = lambda *names: None  # type: ignore[method-assign]
    console = Console(file=io.StringIO())
    result = own_answers.run(options, resources, console)
    rows = {(row["method"], row["pooling"]): row for row in result["rows"]}
    for method in (*own_answers.OURS, *own_answers.WORDS, "heads-mean", own_summary.HEADS):
        pooling = "sum" if method.startswith("heads") else "mean"
        assert rows[method, pooling]["n"] == 4
    for method in (*own_answers.COST, *own_answers.HF):
        assert rows[method, "mean"]["n"] == 2
        assert rows[method, "best 2"]["lds"][3] == 2
        assert method not in own_answers.DROPPED or rows[method, "mean"]["drop3"][3] == 2
    assert result["answers"] == {"digits": [12, 16], "code": [12, 16]}
    wide = {row["method"]: row for row in result["wide"]["rows"]}
    assert list(wide) == [*own_answers.WIDE, own_summary.HEADS]
    assert {row["n"] for row in wide.values()} == {6}
    assert {row["tasks"]["code"][1] for row in wide.values()} == {3}
    assert not any(row["test"] for row in wide.values())  # Six pairs are too few.
    table = own_summary.tables(result)
    assert "tokens (n = 6) |" in own_summary.by_length(result, result)
    assert "| digits (3) | code (3) |" in table
    for method in (*own_answers.OURS, *own_answers.COST, *own_answers.HF, *own_answers.WORDS):
        assert f"| {method} | " in table
    assert "| right answers | 12 of 16 | 12 of 16 |" in table
    own_summary.draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

    done = work.read_text().count("\n")
    again = own_answers.run(options, resources, console)
    assert work.read_text().count("\n") == done + 1  # The session's own row.
    assert again["rows"] == result["rows"]

    # The best sentence is really cut out, and nothing else.
    [case, *_] = own_answers.make_cases(
        options, WorkFile(work, fingerprint_of(work)), resources.tokenizer
    )
    first, end = case.prepared.sentences[2]
    tokens = list(case.prepared.token_ids)
    response = case.prepared.response_length
    whole = reference(hf, tokens, response)
    lost = whole - reference(hf, tokens[:first] + tokens[end:], response)
    ablations = own_answers.CutFamily(resources).attribute(case.prepared, ["loo-sentence"])
    at = first - case.prepared.user[0]
    assert ablations["loo-sentence"].values[at] * (end - first) == pytest.approx(lost, abs=1e-3)


def fingerprint_of(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(work.read_text().splitlines()[0])["fingerprint"]
    return found


def test_attention_of_sentences_equals_hugging_face(
    engine: EngineResource, hf_model: HFModel, prepared: Prepared
) -> None:
    recorded = hf_model.recorded(prepared)
    sums, _ = attention_by_sentence(engine.ft, prepared)
    rows = slice(prepared.target[0] - 1, prepared.target[1] - 1)
    for own, (first, end) in zip(sums, prepared.sentences, strict=True):
        heads = [layer.attention[:, rows, first:end].sum(2).mean(1) for layer in recorded.layers]
        np.testing.assert_allclose(own, torch.cat(heads).numpy(), rtol=2e-2, atol=1e-3)


def test_logit_directions_are_what_attention_adds_to_the_logits(
    hf_model: HFModel, prepared: Prepared
) -> None:
    """Over all tokens they sum to what the attention blocks write, along the same directions."""
    recorded = hf_model.recorded(prepared)
    total = logit_directions(hf_model, recorded, prepared).sum()
    first, end = prepared.target
    rows = slice(first - 1, end - 1)
    written = sum((layer.after - layer.before)[rows] for layer in recorded.layers)
    model = hf_model.model
    with torch.no_grad():
        head = model.lm_head.weight
        unembedding = head[list(prepared.token_ids[first:end])] - head.mean(0)
        hooked: list[torch.Tensor] = []
        handle = model.model.norm.register_forward_pre_hook(
            lambda _, args: hooked.append(args[0][0])
        )
        model.model(input_ids=torch.tensor([prepared.token_ids]))
        handle.remove()
        factor = (
            hooked[0][rows].pow(2).mean(-1, keepdim=True) + model.model.norm.variance_epsilon
        ).rsqrt()
        expected = (written * unembedding * model.model.norm.weight * factor).sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)
