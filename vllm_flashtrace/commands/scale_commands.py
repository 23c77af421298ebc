"""``vllm-flashtrace batch`` and ``deploy``: arguments of the commands that run several engines.

Invariant: Ray, torch and vLLM are imported only when a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_flashtrace.base.command_error import CommandError


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
    try:
        from vllm_flashtrace.scale.batch import options as batch_options
        from vllm_flashtrace.scale.batch.run_batch import run_batch

        options = batch_options.BatchOptions(
            input=input_path,
            output=output,
            model=model,
            argv=batch_options.engine_argv(engine_options or ()),
            replicas=batch_options.parse_replicas(replicas),
            batch_size=batch_size,
            defaults=batch_options.Defaults(batch_options.parse_flashtrace(flashtrace), max_tokens),
        )
        return run_batch(options)
    except ModuleNotFoundError as error:
        raise CommandError(f"batch needs {error.name}; install vllm-flashtrace[scale]") from None
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None


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
    try:
        from vllm_flashtrace.scale.deploy import options as deploy_options
        from vllm_flashtrace.scale.deploy.run_deploy import run_deploy

        if model.startswith("-"):
            raise ValueError(f"the model comes before options of vllm serve, got {model}")
        scaling = deploy_options.parse_scaling(
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
        return run_deploy(
            deploy_options.DeployOptions(
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
        )
    except ModuleNotFoundError as error:
        raise CommandError(f"deploy needs {error.name}; install vllm-flashtrace[scale]") from None
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None
