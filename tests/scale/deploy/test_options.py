"""What a deployment is made from."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import replace

import pytest

from vllm_flashtrace.base.process import bind_cores, binding
from vllm_flashtrace.scale.deploy.run_deploy import (
    DeployOptions,
    check_engine_options,
    cpus_per_replica,
    parse_scaling,
    passed_environment,
    version_of,
)
from vllm_flashtrace.scale.deploy.served_replica import ReplicaPlan

NONE = {"min_replicas": None, "max_replicas": None}
PLAN = ReplicaPlan(("--model", "m"), "d", {"VLLM_X": "1"}, 1, 2.0, 60.0)


def test_a_fixed_number_is_the_default():
    assert parse_scaling(None, NONE, None) == {"num_replicas": 1}
    assert parse_scaling(3, NONE, None) == {"num_replicas": 3}


def test_autoscaling_reaches_serve():
    chosen = {**NONE, "max_replicas": 4, "target_ongoing_requests": 2.5}
    assert parse_scaling(None, chosen, '{"upscaling_factor": 2, "max_replicas": 5}') == {
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": 5,
            "target_ongoing_requests": 2.5,
            "upscaling_factor": 2,
        }
    }
    scaling = parse_scaling(None, {"min_replicas": 0, "max_replicas": 2}, None)
    assert scaling["autoscaling_config"]["min_replicas"] == 0
    assert DeployOptions((), scaling=scaling).most_replicas == 2


@pytest.mark.parametrize(
    ("replicas", "chosen", "more", "message"),
    [
        (2, {"max_replicas": 3}, None, "--replicas .* --max-replicas"),
        (None, {"min_replicas": 1}, None, "needs --max-replicas"),
        (None, {"min_replicas": 3, "max_replicas": 2}, None, "3 is more than --max-replicas 2"),
        (None, {}, "[", "--autoscaling: not JSON"),
        (None, {}, "[1]", "must be a JSON object"),
    ],
)
def test_contradictions_are_refused(replicas, chosen, more, message):
    with pytest.raises(ValueError, match=message):
        parse_scaling(replicas, chosen, more)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("data_parallel_size", 2),
        ("api_server_count", 2),
        ("headless", True),
        ("uds", "/x"),
        ("grpc", True),
    ],
)
def test_engine_options_without_meaning_are_refused(option, value):
    plain = {"data_parallel_size": 1, "api_server_count": None, "headless": False, "uds": None}
    check_engine_options(Namespace(**plain))
    name = "--" + option.replace("_", "-")
    with pytest.raises(ValueError, match=f"^{name} .*--replicas"):
        check_engine_options(Namespace(**{**plain, option: value}))


@pytest.mark.parametrize(
    ("rank", "cpus", "workers", "expected"),
    [
        (0, 1, 1, "4"),
        (1, 1, 1, "5"),
        (0, 2, 1, "4,5"),
        (1, 2, 2, "6|7"),
        (2, 2, 1, "4,5"),  # More replicas than cores: they share.
        (0, 0.5, 1, "4"),
        (0, 8, 1, "4,5,6,7"),
        (0, 1, 2, "4|4"),
    ],
)
def test_cores_of_a_replica(rank, cpus, workers, expected):
    assert binding([4, 5, 6, 7], rank, cpus, workers) == expected


def test_replicas_share_no_core_while_there_are_enough():
    cores = [core for rank in range(4) for core in binding(range(8), rank, 2, 1).split(",")]
    assert sorted(cores) == sorted(set(cores))


def test_the_users_binding_stands(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    bind_cores(1, 2, 1)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"


@pytest.mark.parametrize(
    ("replicas", "given", "cores", "expected"),
    [(2, None, 5, 2.0), (4, None, 2, 0.5), (2, 3.0, 4, 3.0), (1, None, 2, 2.0)],
)
def test_cores_are_shared_equally_unless_given(replicas, given, cores, expected):
    scaling = {"num_replicas": replicas}
    options = DeployOptions((), scaling=scaling, cpus_per_replica=given)
    assert cpus_per_replica(options, cores) == expected


def test_a_version_is_that_of_the_plan():
    assert version_of(PLAN) == version_of(replace(PLAN, environment={"VLLM_X": "1"}))
    for other in (
        replace(PLAN, argv=("--model", "other")),
        replace(PLAN, environment={"VLLM_X": "2"}),
        replace(PLAN, cpus=1.0),
    ):
        assert version_of(other) != version_of(PLAN)


def test_engines_see_the_variables_of_vllm_alone(monkeypatch):
    monkeypatch.setenv("VLLM_SOMETHING", "1")
    monkeypatch.setenv("HF_HOME", "/h")
    monkeypatch.setenv("SECRET", "s")
    passed = passed_environment()
    assert (passed["VLLM_SOMETHING"], passed["HF_HOME"]) == ("1", "/h")
    assert "SECRET" not in passed
    assert list(passed) == sorted(passed)
