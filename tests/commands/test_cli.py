from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import vllm_flashtrace
from tests.api.test_attribution import failed, flashtrace
from vllm_flashtrace import Attribution, TraceError
from vllm_flashtrace.commands import cli, trace_command
from vllm_flashtrace.offline import engine as offline_engine


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    return int(stopped.value.code or 0)


def only_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("vllm-flashtrace: ")
    return err


class FakeEngine:
    """Answers at once and remembers what it was asked."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.model = ""
        self.engine_args: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}

    def generate(self, prompt: Any, params: Any, flashtrace: Any) -> list[Attribution]:
        self.asked = {"prompt": prompt, "params": params, "flashtrace": flashtrace}
        return [Attribution(self.result, text="It is 7306.")]

    def attribute(self, prompt: Any, completion: str, flashtrace: Any) -> Attribution:
        self.asked = {"prompt": prompt, "completion": completion, "flashtrace": flashtrace}
        return Attribution(self.result, text=completion)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine(flashtrace())

    @contextmanager
    def command_engine(model: str, **engine_args: Any) -> Iterator[FakeEngine]:
        fake.model, fake.engine_args = model, engine_args
        yield fake

    monkeypatch.setattr(trace_command, "command_engine", command_engine)
    monkeypatch.setitem(
        sys.modules, "vllm", types.SimpleNamespace(SamplingParams=types.SimpleNamespace)
    )
    return fake


@pytest.fixture
def prompt_file(tmp_path: Path) -> str:
    path = tmp_path / "prompt.txt"
    path.write_text("The code is 7306. Code?", "utf-8")
    return str(path)


def trace(prompt_file: str, *options: str) -> int:
    return run("trace", "--model", "m", "--prompt-file", prompt_file, *options)


def test_help_needs_neither_torch_nor_vllm() -> None:
    # A process of its own: in this one torch is loaded already.
    code = """
import sys
from vllm_flashtrace.commands.cli import main
for command in [], ["trace"], ["demo"], ["batch"], ["deploy"], ["fit-heads"], ["serve"]:
    try:
        main([*command, "--help"])
    except SystemExit as stopped:
        print("exit", stopped.code)
print("loaded", sorted({"torch", "vllm", "transformers", "ray"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines().count("exit 0") == 7
    assert result.stdout.splitlines()[-1] == "loaded []"
    assert result.stdout.lower().count("usage: vllm-flashtrace") == 7


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"vllm-flashtrace {vllm_flashtrace.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["frobnicate"], "frobnicate"),
        (["trace", "--model", "m"], "--prompt-file"),
        (["trace", "--model", "m", "--prompt-file", "p", "--top-k", "x"], "top-k"),
        (["demo", "--frobnicate"], "--frobnicate"),
    ],
)
def test_usage_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert message in only_error_line(capsys)


@pytest.mark.parametrize(
    "argv",
    [
        ["model", "--port", "8000", "-tp", "2", "--additional-config", '{"a": 1}'],
        ["--help"],
        ["--", "--version"],
        ["--model=x", "-h"],
        [],
    ],
)
def test_serve_passes_everything_on(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Sequence[str]] = []
    launcher = types.SimpleNamespace(main=calls.append)
    monkeypatch.setitem(sys.modules, "vllm_flashtrace.server.launcher", launcher)
    assert run("serve", *argv) == 0
    assert calls == [argv]


class TestTrace:
    def test_generates_and_shows(
        self, engine: FakeEngine, prompt_file: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert trace(prompt_file, "--max-tokens", "7", "--max-model-len", "99") == 0
        assert engine.model == "m"
        assert engine.engine_args["max_model_len"] == 99
        assert engine.engine_args["enforce_eager"] is True
        assert engine.asked["prompt"] == "The code is 7306. Code?"
        assert vars(engine.asked["params"]) == {"temperature": 0.0, "max_tokens": 7}
        assert engine.asked["flashtrace"]["top_k"] is None
        assert "06" in capsys.readouterr().out

    def test_the_model_is_compiled_if_asked(self, engine: FakeEngine, prompt_file: str) -> None:
        assert trace(prompt_file, "--no-enforce-eager") == 0
        assert engine.engine_args["enforce_eager"] is False

    def test_writes_files(self, engine: FakeEngine, prompt_file: str, tmp_path: Path) -> None:
        json_file, html_file = tmp_path / "a.json", tmp_path / "a.html"
        assert trace(prompt_file, "--json", str(json_file), "--html", str(html_file)) == 0
        assert json.loads(json_file.read_text("utf-8"))["text"] == "It is 7306."
        assert "7306" in html_file.read_text("utf-8")

    def test_existing_completion_is_not_generated(
        self, engine: FakeEngine, prompt_file: str, tmp_path: Path
    ) -> None:
        completion = tmp_path / "completion.txt"
        completion.write_text("7306, of course", "utf-8")
        options = ("--hops", "auto", "--target-text", "7306")
        assert trace(prompt_file, "--completion-file", str(completion), *options) == 0
        assert engine.asked["completion"] == "7306, of course"
        assert engine.asked["flashtrace"]["target"] == {"text": "7306"}
        assert engine.asked["flashtrace"]["hops"] == "auto"

    def test_messages(self, engine: FakeEngine, tmp_path: Path) -> None:
        messages = [{"role": "user", "content": "Code?"}]
        path = tmp_path / "messages.json"
        path.write_text(json.dumps(messages), "utf-8")
        assert trace(str(path), "--system", "Be brief.") == 0
        assert engine.asked["prompt"] == [{"role": "system", "content": "Be brief."}, *messages]

    def test_text_as_chat(self, engine: FakeEngine, prompt_file: str) -> None:
        assert trace(prompt_file, "--chat") == 0
        assert engine.asked["prompt"] == [{"role": "user", "content": "The code is 7306. Code?"}]

    def test_json_that_is_no_list_of_messages_is_text(
        self, engine: FakeEngine, tmp_path: Path
    ) -> None:
        path = tmp_path / "numbers.json"
        path.write_text("[1, 2]", "utf-8")
        assert trace(str(path)) == 0
        assert engine.asked["prompt"] == "[1, 2]"

    def test_failed_trace_still_shows_and_writes(
        self,
        engine: FakeEngine,
        prompt_file: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        engine.result = failed()
        assert trace(prompt_file, "--json", str(tmp_path / "a.json")) == 2
        out, err = capsys.readouterr()
        assert out == "Completion  It is 7306.\n"
        assert err.startswith("vllm-flashtrace: the attribution failed: ")
        assert "(target_not_found)" in err and err.count("\n") == 1
        assert json.loads((tmp_path / "a.json").read_text("utf-8"))["text"] == "It is 7306."

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            (None, [], "prompt"),
            (b"", [], "empty"),
            (b"\xff\xfe", [], "UTF-8"),
            (b'[{"content": "x"}]', [], "message 0 has no role"),
            (b'[{"role": "system", "content": "x"}]', ["--system", "y"], "--system"),
            (b"x", ["--hops", "-1"], "--hops"),
            (b"x", ["--hops", "999"], "flashtrace.hops"),
            (b"x", ["--target-text", ""], "flashtrace.target.text"),
            (b"x", ["--completion-file", "/nonexistent/c"], "/nonexistent/c"),
            (b"x", ["--completion-file", "/dev/null"], "--completion-file /dev/null is empty"),
            (b"x", ["--model", "/nonexistent/m"], "--model /nonexistent/m does not exist"),
            (b"x", ["--json", "/nonexistent/a.json"], "/nonexistent"),
            (b"x", ["--html", "/"], "is a folder"),
        ],
    )
    def test_mistakes_are_found_before_an_engine_starts(
        self,
        content: bytes | None,
        options: list[str],
        message: str,
        engine: FakeEngine,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = tmp_path / "prompt"
        if content is not None:
            path.write_bytes(content)
        assert trace(str(path), *options) == 2
        assert message in only_error_line(capsys)
        assert engine.model == ""


class TestBatch:
    @pytest.fixture
    def ran(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        from vllm_flashtrace.scale.batch import run_batch as command

        ran: list[Any] = []
        monkeypatch.setattr(command, "run_batch", lambda options: ran.append(options) or 143)
        return ran

    def batch(self, *options: str) -> int:
        return run("batch", "--input", "in.jsonl", "--output", "out", "--model", "m", *options)

    def test_options_reach_the_run(self, ran: list[Any]) -> None:
        engine = ("--max-model-len", "2048", "--enforce-eager", "-tp", "2")
        options = ("--replicas", "1-4", "--flashtrace", '{"hops": 2}', "--max-tokens", "7")
        assert self.batch(*options, "--", *engine) == 143
        assert ran[0].argv == engine
        assert (ran[0].replicas, ran[0].model, ran[0].batch_size) == ((1, 4), "m", 32)
        assert (ran[0].defaults.flashtrace, ran[0].defaults.max_tokens) == ({"hops": 2}, 7)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--replicas", "0"], "--replicas"),
            (["--flashtrace", "{"], "--flashtrace"),
            (["--flashtrace", '{"hops": -1}'], "flashtrace.hops"),
            (["--", "--port", "1"], "--port"),
            (["--batch-size", "0"], "batch-size"),
        ],
    )
    def test_mistakes_are_one_line(
        self, options: list[str], message: str, ran: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.batch(*options) == 2
        assert message in only_error_line(capsys)
        assert ran == []

    def test_missing_input(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.batch() == 2
        assert "in.jsonl" in only_error_line(capsys)

    def test_output_in_the_input_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in.jsonl").write_text("{}")
        folders = ("--input", str(tmp_path), "--output", str(tmp_path / "out"))
        assert run("batch", "--model", "m", *folders) == 2
        assert "lies in the input" in only_error_line(capsys)
        assert not (tmp_path / "out").exists()

    def test_missing_ray_names_the_extra(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        monkeypatch.setitem(sys.modules, "ray.data", None)
        assert self.batch() == 2
        assert "install vllm-flashtrace[scale]" in only_error_line(capsys)


class TestDeploy:
    @pytest.fixture
    def ran(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        from vllm_flashtrace.scale.deploy import run_deploy as command

        ran: list[Any] = []
        monkeypatch.setattr(command, "run_deploy", lambda options: ran.append(options) or 143)
        return ran

    def test_options_reach_the_deployment_and_the_engine(self, ran: list[Any]) -> None:
        ours = ("--replicas", "2", "--port", "8001", "--no-blocking", "--drain-timeout", "9")
        engine = ("--max-model-len", "2048", "-tp", "2", "--enforce-eager", "--dtype=float32")
        assert run("deploy", "m", *engine[:4], *ours, *engine[4:]) == 143
        [options] = ran
        assert options.argv == ("--model", "m", *engine)
        assert options.scaling == {"num_replicas": 2}
        assert (options.host, options.port, options.blocking) == ("127.0.0.1", 8001, False)
        assert options.drain_seconds == 9

    def test_autoscaling(self, ran: list[Any]) -> None:
        options = ("--min-replicas", "0", "--max-replicas", "3", "--downscale-delay-s", "5")
        more = ("--autoscaling", '{"metrics_interval_s": 2}')
        assert run("deploy", "m", *options, *more) == 143
        assert ran[0].scaling["autoscaling_config"] == {
            "min_replicas": 0,
            "max_replicas": 3,
            "downscale_delay_s": 5,
            "metrics_interval_s": 2,
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "model"),
            (["--enforce-eager", "m"], "--enforce-eager"),
            (["m", "--replicas", "0"], "replicas"),
            (["m", "--replicas", "2", "--max-replicas", "3"], "--max-replicas"),
            (["m", "--min-replicas", "2"], "--max-replicas"),
            (["m", "--autoscaling", "{"], "--autoscaling"),
        ],
    )
    def test_mistakes_are_one_line(
        self, options: list[str], message: str, ran: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("deploy", *options) == 2
        assert message in only_error_line(capsys)
        assert ran == []

    def test_a_cluster_to_stay_in_is_needed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        assert run("deploy", "m", "--no-blocking") == 2
        assert "RAY_ADDRESS" in only_error_line(capsys)

    def test_a_taken_port_is_found_before_anything_starts(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert run("deploy", "m", "--port", port) == 2
        assert f"port {port}" in only_error_line(capsys)

    def test_missing_ray_names_the_extra(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for module in ("ray", "ray.serve"):
            monkeypatch.setitem(sys.modules, module, None)
        assert run("deploy", "m") == 2
        assert "install vllm-flashtrace[scale]" in only_error_line(capsys)


class TestDemo:
    def test_model_path_is_the_last_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from vllm_flashtrace import models

        monkeypatch.setattr(models, "prepare_smollm2", lambda: Path("/cache/model"))
        assert run("demo", "--model-path") == 0
        assert capsys.readouterr().out == "/cache/model\n"

    def test_model_that_cannot_be_prepared(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from vllm_flashtrace import models
        from vllm_flashtrace.models.smollm2 import ModelPreparationError

        def refuse() -> Path:
            raise ModelPreparationError("no network")

        monkeypatch.setattr(models, "prepare_smollm2", refuse)
        assert run("demo", "--model-path") == 2
        assert "no network" in only_error_line(capsys)

    @pytest.mark.parametrize("code", [0, 1])
    def test_exit_code_is_the_demos(self, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm_flashtrace.commands import demo

        calls: list[tuple[Path, bool]] = []

        def run_demo(html_path: Path, *, full: bool) -> int:
            calls.append((html_path, full))
            return code

        monkeypatch.setattr(demo, "run_demo", run_demo)
        assert run("demo", "--html", "page.html", "--full") == code
        assert calls == [(Path("page.html"), True)]

    def test_missing_dependency_is_named(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delitem(sys.modules, "vllm_flashtrace.commands.demo", raising=False)
        monkeypatch.setitem(sys.modules, "vllm_flashtrace.commands.demo", None)
        assert run("demo") == 2
        assert "vllm_flashtrace.commands.demo" in only_error_line(capsys)


class TestEngineLog:
    @pytest.fixture(autouse=True)
    def _settings(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
        monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def test_output_of_child_processes_is_kept_apart(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with offline_engine.engine_log():
            subprocess.run([sys.executable, "-c", "import os; os.write(2, b'noise')"], check=True)
            [log] = tmp_path.iterdir()
            assert log.read_text() == "noise"
        assert list(tmp_path.iterdir()) == []
        os.write(2, b"ours")
        assert capfd.readouterr().err == "ours"

    def test_a_failure_names_the_log(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(RuntimeError) as caught, offline_engine.engine_log():
            os.write(2, b"reason")
            raise RuntimeError("boom")
        [log] = tmp_path.iterdir()
        assert log.read_text() == "reason"
        assert caught.value.__notes__ == [f"engine log: {log}"]
        assert capfd.readouterr().err == ""

    def test_a_chosen_level_is_respected(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        with offline_engine.engine_log():
            os.write(2, b"wanted")
        assert capfd.readouterr().err == "wanted"

    @pytest.mark.parametrize(
        ("logged", "error", "cause"),
        [
            ("", ValueError("2 errors:\n  no such model"), "2 errors: no such model"),
            ("", KeyError(), "KeyError"),
            (
                "(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:9] ValueError: no room\n"
                "(EngineCore pid=7) RuntimeError: see root cause above\n",
                RuntimeError("Engine core initialization failed. See root cause above."),
                "ValueError: no room",
            ),
        ],
    )
    def test_an_engine_that_does_not_start_is_one_line_that_names_the_cause(
        self,
        logged: str,
        error: Exception,
        cause: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from vllm_flashtrace.offline import flashtrace as offline

        def refuse(model: str, **engine_args: Any) -> None:
            os.write(2, logged.encode())
            raise error

        monkeypatch.setattr(offline, "FlashTrace", refuse)
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("x", "utf-8")
        assert trace(str(prompt)) == 2
        message = only_error_line(capsys)
        assert message.startswith(f"vllm-flashtrace: the engine of m failed: {cause}; engine log: ")
        log = Path(message.rpartition("engine log: ")[2].strip())
        assert "Traceback" in log.read_text()

    def test_a_missing_vllm_names_the_extra(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from vllm_flashtrace.offline import flashtrace as offline

        def refuse(model: str, **engine_args: Any) -> None:
            raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

        monkeypatch.setattr(offline, "FlashTrace", refuse)
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("x", "utf-8")
        assert trace(str(prompt)) == 2
        assert "vllm is not installed; install vllm-flashtrace[cpu]" in only_error_line(capsys)

    def test_the_engine_is_stopped_when_its_work_fails(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from vllm_flashtrace.offline import flashtrace as offline

        stopped: list[bool] = []
        monkeypatch.delenv("FLASHTRACE_END_WITH_PARENT", raising=False)

        @contextmanager
        def engine(model: str, **_: Any) -> Iterator[None]:
            # Also when the command is killed.
            assert os.environ["FLASHTRACE_END_WITH_PARENT"] == "1"
            try:
                yield
            finally:
                stopped.append(True)

        monkeypatch.setattr(offline, "FlashTrace", engine)
        with pytest.raises(TraceError, match="too long"), trace_command.command_engine("m"):
            raise ValueError("prompt too long")
        assert stopped == [True]
