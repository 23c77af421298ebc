"""The ``vllm-flashtrace`` command line.

Torch, vLLM and Ray are imported only when a command runs, so that help and usage errors come at
once. A user's mistake is one line on standard error and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from vllm_flashtrace.base import __version__
from vllm_flashtrace.base.errors import CommandError, FlashTraceError, in_one_line

PROGRAM = "vllm-flashtrace"
USER_ERROR = 2

app = typer.Typer(
    name=PROGRAM,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Tells, for every completion, which prompt tokens it came from.",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments after the program's name; those of the process if None.

    Raises:
        SystemExit: Always; 0 on success, 2 for a mistake in the arguments or their files.
    """
    try:
        arguments = None if argv is None else list(argv)
        code = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(0)
        _fail(error.format_message())
    except (CommandError, FlashTraceError) as error:
        _fail(str(error), getattr(error, "__notes__", ()))
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        _fail("vllm is not installed; install vllm-flashtrace[cpu] or vllm-flashtrace[cuda]")
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code or 0)


def _fail(message: str, notes: Sequence[str] = ()) -> NoReturn:
    reason = "; ".join([" ".join(message.split()) or "failed", *notes])
    print(f"{PROGRAM}: {reason}", file=sys.stderr)
    sys.exit(USER_ERROR)


@contextmanager
def _mistakes_in_one_line(extra: str | None = None) -> Iterator[None]:
    """Reports what the user got wrong as a `CommandError`.

    Args:
        extra: Extra of this package that brings any module which is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        message = f"{error.name} is not installed; install vllm-flashtrace[{extra}]"
        raise CommandError(message) from None
    except (OSError, ValueError) as error:
        raise CommandError(in_one_line(error)) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version."),
    ] = False,
) -> None:
    pass


class _PassThroughCommand(TyperCommand):
    """A command that leaves its arguments, ``--help`` and ``--`` included, as they are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keeps everything in ``ctx.args``."""
        ctx.args = list(args)
        return []


@app.command(cls=_PassThroughCommand, add_help_option=False)
def serve(ctx: typer.Context) -> None:
    """Serve a model: `vllm serve` with attribution on; takes all of its options."""
    from vllm_flashtrace.server.launcher import main as launch

    launch(ctx.args)


@app.command()
def trace(
    model: Annotated[str, typer.Option(help="Model name or folder.")],
    prompt_file: Annotated[
        Path, typer.Option(help="Text, or a JSON list of chat messages; - reads standard input.")
    ],
    completion_file: Annotated[
        Path | None, typer.Option(help="Explain this text instead of generating one.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the attribution as JSON.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a page with the heat-map.")
    ] = None,
    hops: Annotated[str, typer.Option(help="Recursive hops: a number, or auto.")] = "auto",
    target_text: Annotated[
        str | None, typer.Option(help="Explain the last occurrence of this text alone.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Rows of the table.")] = 10,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 256,
    system: Annotated[
        str | None, typer.Option(help="Send the prompt as a chat with this system message.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send a text prompt as a chat's user message.")
    ] = False,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Longest prompt with completion, in tokens.")
    ] = None,
    enforce_eager: Annotated[
        bool, typer.Option(help="Start without compiling the model, which takes longer than a run.")
    ] = True,
    full: Annotated[bool, typer.Option("--full", help="Print the prompt without gaps.")] = False,
) -> None:
    """Complete a prompt, or take a completion, and show which tokens it came from."""
    from vllm_flashtrace.commands import trace_command as command

    with _mistakes_in_one_line():
        command.check_model(model)
        prompt = command.read_prompt(prompt_file, system=system, chat=chat)
        completion = None
        if completion_file is not None:
            completion = command.read_text(completion_file, "--completion-file")
        field = command.flashtrace_field(hops, target_text)
        command.check_writable(path for path in (json_file, html_file) if path is not None)
    attribution = command.run_trace(
        model,
        prompt,
        completion,
        field,
        max_tokens=max_tokens,
        max_model_len=max_model_len,
        enforce_eager=enforce_eager,
    )
    command.show(attribution, full=full, rows=top_k)
    if json_file is not None:
        attribution.to_json(json_file)
    if html_file is not None:
        attribution.to_html(html_file)
    if attribution.status != "completed":
        raise CommandError(command.why_none(attribution))


@app.command()
def batch(
    input_path: Annotated[
        Path, typer.Option("--input", help="A .jsonl or .parquet file, or a folder of them.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the results.")],
    model: Annotated[str, typer.Option(help="Model name or folder.")],
    engine_options: Annotated[
        list[str] | None, typer.Argument(help="After --: any option of vllm serve.")
    ] = None,
    replicas: Annotated[
        str, typer.Option(help="Engines to run: a number, or the fewest and the most as in 1-4.")
    ] = "1",
    flashtrace: Annotated[
        str, typer.Option(help="The flashtrace field of rows that have none, as JSON.")
    ] = "true",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows an engine gets at once.")] = 32,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to generate for rows that do not say.")
    ] = None,
) -> int:
    """Complete and attribute whole files; the same command again goes on where it stopped."""
    with _mistakes_in_one_line("scale"):
        from vllm_flashtrace.scale.batch import run_batch as command

        options = command.BatchOptions(
            input=input_path,
            output=output,
            model=model,
            argv=command.engine_argv(engine_options or ()),
            replicas=command.parse_replicas(replicas),
            batch_size=batch_size,
            defaults=command.Defaults(command.parse_flashtrace(flashtrace), max_tokens),
        )
        return command.run_batch(options)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def deploy(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Model name or folder; any options of vllm serve may follow.")
    ],
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Engines to run; 1 unless autoscaled.")
    ] = None,
    min_replicas: Annotated[
        int | None, typer.Option(min=0, help="Autoscaling: the fewest engines.")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Autoscaling: the most engines.")
    ] = None,
    target_ongoing_requests: Annotated[
        float | None, typer.Option(help="Autoscaling: requests per engine to aim at.")
    ] = None,
    upscale_delay_s: Annotated[
        float | None, typer.Option(help="Autoscaling: wait before an engine is added.")
    ] = None,
    downscale_delay_s: Annotated[
        float | None, typer.Option(help="Autoscaling: wait before an engine is removed.")
    ] = None,
    autoscaling: Annotated[
        str | None, typer.Option(help="Further options of Serve's AutoscalingConfig, as JSON.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[str, typer.Option(help="Name of the Serve application.")] = "flashtrace",
    max_ongoing_requests: Annotated[
        int, typer.Option(min=1, help="Requests an engine has at once; more wait.")
    ] = 256,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds to finish requests and traces when stopped.")
    ] = 60.0,
    cpus_per_replica: Annotated[
        float | None, typer.Option(help="Cores of an engine on CPU; an equal share if not given.")
    ] = None,
    gateways: Annotated[int, typer.Option(min=1, help="Processes that forward requests.")] = 1,
    request_router: Annotated[
        str | None, typer.Option(help="Import path of a Serve request router.")
    ] = None,
    blocking: Annotated[
        bool, typer.Option(help="Stay, and take the deployment down when stopped.")
    ] = True,
) -> int:
    """Serve a model from several engines, behind Ray Serve; takes all options of vllm serve."""
    with _mistakes_in_one_line("scale"):
        from vllm_flashtrace.scale.deploy import run_deploy as command

        if model.startswith("-"):
            raise ValueError(f"the model comes before options of vllm serve, got {model}")
        scaling = command.parse_scaling(
            replicas,
            {
                "min_replicas": min_replicas,
                "max_replicas": max_replicas,
                "target_ongoing_requests": target_ongoing_requests,
                "upscale_delay_s": upscale_delay_s,
                "downscale_delay_s": downscale_delay_s,
            },
            autoscaling,
        )
        options = command.DeployOptions(
            argv=("--model", model, *ctx.args),
            host=host,
            port=port,
            name=name,
            scaling=scaling,
            max_ongoing_requests=max_ongoing_requests,
            drain_seconds=drain_timeout,
            cpus_per_replica=cpus_per_replica,
            gateways=gateways,
            request_router=request_router,
            blocking=blocking,
        )
        return command.run_deploy(options)


@app.command("fit-heads")
def fit_heads(
    model: Annotated[str, typer.Option(help="Model name or folder.")],
    data: Annotated[
        Path,
        typer.Option(
            help="A .jsonl file: messages or a prompt in each line, a response unless the model is "
            "to write it, and a task by which lines are held out."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write, for the server's option heads.")],
    ablations: Annotated[int, typer.Option(min=2, help="Ablations of each line.")] = 8,
    ridge: Annotated[
        float, typer.Option(help="Penalty, in units of the mean square of a head's feature.")
    ] = 3.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Lines to use, the first ones.")] = None,
    dtype: Annotated[str, typer.Option(help="The model's type, as vllm serve takes it.")] = "auto",
    seed: Annotated[int, typer.Option(help="Draws the ablations and what is held out.")] = 0,
    work: Annotated[
        Path | None,
        typer.Option(help="Keep what is measured in this file; the command goes on from it."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a response.")] = 256,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Longest prompt with response, in tokens.")
    ] = None,
    enforce_eager: Annotated[bool, typer.Option(help="Start without compiling the model.")] = True,
) -> None:
    """Learn which attention heads tell sources, for the request field ``heads``."""
    from vllm_flashtrace.commands import fit_heads as command
    from vllm_flashtrace.commands.trace_command import check_model, check_writable

    with _mistakes_in_one_line():
        check_model(model)
        if not ridge > 0:
            raise ValueError(f"--ridge must be above 0, got {ridge}")
        if Path(model).is_dir() and out.resolve().parent == Path(model).resolve():
            raise ValueError(f"--out {out}: vLLM would load it as weights of the model")
        lines = command.read_lines(data, limit)
        check_writable(path for path in (out, work, json_file) if path is not None)
        options = command.FitOptions(
            model=model,
            out=out,
            ablations=ablations,
            ridge=ridge,
            seed=seed,
            max_tokens=max_tokens,
            dtype=dtype,
            max_model_len=max_model_len,
            enforce_eager=enforce_eager,
            work=work,
            json_file=json_file,
        )
        command.run_fit(lines, options)


@app.command()
def demo(
    model_path: Annotated[
        bool, typer.Option("--model-path", help="Only prepare the model and print its folder.")
    ] = False,
    html_file: Annotated[Path, typer.Option("--html", help="Where to write the page.")] = Path(
        "flashtrace-demo.html"
    ),
    full: Annotated[bool, typer.Option("--full", help="Print the prompt without gaps.")] = False,
) -> int:
    """Ask a small bundled model a question whose answer is hidden in a long context."""
    with _mistakes_in_one_line("cpu,demo"):
        if model_path:
            from vllm_flashtrace.models import prepare_smollm2

            print(prepare_smollm2())
            return 0
        from vllm_flashtrace.commands.demo import run_demo
    return run_demo(html_file, full=full)
