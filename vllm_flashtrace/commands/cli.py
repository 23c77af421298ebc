"""The ``vllm-flashtrace`` command.

Invariant: the command line itself imports neither torch nor vLLM, so help and usage errors are
instant; a mistake of the user's is one line on standard error and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from vllm_flashtrace import __version__
from vllm_flashtrace.base.command_error import CommandError
from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.commands.scale_commands import batch, deploy

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


class _PassThroughCommand(TyperCommand):
    """A command that leaves its arguments, ``--help`` and ``--`` included, as they are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keeps everything in ``ctx.args``."""
        ctx.args = list(args)
        return []


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
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code or 0)


def _fail(message: str, notes: Sequence[str] = ()) -> NoReturn:
    lines = [line for line in map(str.strip, message.splitlines()) if line]
    reason = "; ".join([*lines[:1], *notes]) or "failed"
    print(f"{PROGRAM}: {reason}", file=sys.stderr)
    sys.exit(USER_ERROR)


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
    hops: Annotated[str, typer.Option(help="Recursive hops: a number, or auto.")] = "1",
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
    full: Annotated[bool, typer.Option("--full", help="Print the prompt without gaps.")] = False,
) -> None:
    """Complete a prompt, or take a completion, and show which tokens it came from."""
    from vllm_flashtrace.commands import trace_command as command

    try:
        prompt = command.read_prompt(prompt_file, system=system, chat=chat)
        completion = command.read_text(completion_file) if completion_file else None
        field = command.flashtrace_field(hops, target_text)
        command.check_writable(path for path in (json_file, html_file) if path is not None)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None
    attribution = command.run_trace(
        model, prompt, completion, field, max_tokens=max_tokens, max_model_len=max_model_len
    )
    command.show(attribution, full=full, rows=top_k)
    if json_file is not None:
        attribution.to_json(json_file)
    if html_file is not None:
        attribution.to_html(html_file)
    if attribution.status != "completed":
        raise CommandError(str(attribution))


app.command()(batch)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(deploy)


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
    try:
        if model_path:
            return _print_model_path()
        from vllm_flashtrace.commands.demo import run_demo
    except ModuleNotFoundError as error:
        raise CommandError(
            f"the demo needs {error.name}; install vllm-flashtrace[cpu,demo]"
        ) from None
    return run_demo(html_file, full=full)


def _print_model_path() -> int:
    from vllm_flashtrace.models import prepare_smollm2
    from vllm_flashtrace.models.smollm2 import ModelPreparationError

    try:
        folder = prepare_smollm2()
    except (ModelPreparationError, OSError) as error:
        raise CommandError(str(error)) from None
    print(folder)
    return 0
