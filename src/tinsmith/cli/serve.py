"""`tinsmith serve`: the Tinker API on this machine."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from tinsmith.observe.logs import FORMAT_VARIABLE, LogFormat, LogLevel, configure_logging

DtypeChoice = Literal["auto", "float32", "bfloat16"]
DeviceChoice = Literal["auto", "cpu", "cuda", "mps"]

LOCAL_API_KEY = "tml-local"
"""Any key will do on loopback; the official SDK only wants one that looks like its own."""


def serve(
    base_model: Annotated[
        list[str] | None,
        typer.Option(
            "--base-model",
            metavar="ID|FOLDER|NAME=FOLDER",
            help="Base model to serve; repeatable. Default: tinsmith/tiny, which ships.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. One that other machines reach needs keys: `tinsmith admin keys`.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Serve HTTPS with this certificate (PEM, its chain included).")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The certificate's private key (PEM, no password).")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Checkpoints and registry. Default: $TINSMITH_DATA_DIR or ~/.local/share/tinsmith."),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="TINSMITH_DATABASE",
            show_envvar=True,
            help="PostgreSQL for the registry, postgresql://USER:PASSWORD@HOST/NAME. Default: a file in --data-dir.",
        ),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|S3-URL",
            envvar="TINSMITH_CHECKPOINTS",
            show_envvar=True,
            help="Where checkpoints are kept: a folder, or s3://BUCKET/PREFIX. Default: --data-dir.",
        ),
    ] = None,
    checkpoint_cache: Annotated[
        float, typer.Option(min=0, metavar="GB", help="Checkpoints of a bucket that stay on this machine after use.")
    ] = 20.0,
    dtype: Annotated[DtypeChoice, typer.Option(help="Of base weights and activations.")] = "auto",
    device: Annotated[DeviceChoice, typer.Option(help="Where to compute.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of an engine. Default: all cores, or what OMP_NUM_THREADS says."),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="Bitwise the same numbers whatever else runs: no two requests share a pass. Slower."
        ),
    ] = False,
    dialect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="API to speak beside Tinker: tinkerbell, openai, anthropic; repeatable. Default: all."
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep what the OpenAI and Anthropic routes sample, token for token."),
    ] = None,
    ledger: Annotated[
        bool,
        typer.Option(
            help="Keep what live sessions ask on disk, so that a killed server or engine goes on where it was."
        ),
    ] = True,
    snapshot_requests: Annotated[
        int, typer.Option(min=1, help="Requests of a model after which it is put on disk, or after a minute.")
    ] = 500,
    adapter_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for adapters in use, of each base model: 512MiB, 8GiB. Models beyond it wait on disk until "
            "used. Default: a share of what is free.",
        ),
    ] = None,
    keep_checkpoints: Annotated[
        int | None,
        typer.Option(
            min=1, help="Newest checkpoints of a kind that a run keeps, unless it says so itself. Default: all."
        ),
    ] = None,
    checkpoint_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="How much all checkpoints may take: 500GB. A save beyond it is refused."),
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Of the log on stderr.")] = "text",
    log_level: Annotated[
        LogLevel, typer.Option(help="info: one line per HTTP request; debug: polls and heartbeats too.")
    ] = "warning",
    otel_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send OpenTelemetry traces to this OTLP/HTTP collector. Default: as OTEL_… variables say.",
        ),
    ] = None,
    auto_create: Annotated[
        bool, typer.Option(help="Tinkerbell: make an adapter when a request names one that does not exist.")
    ] = True,
) -> None:
    """Serve the Tinker API; prints one line when ready and runs until Ctrl-C."""
    from tinsmith.control.settings import HealthSettings
    from tinsmith.server.app import create_app
    from tinsmith.server.assemble import default_data_dir, open_control, open_tracing
    from tinsmith.server.errors import is_loopback
    from tinsmith.server.run import allow_many_connections, bind, print_aside, run_app, tls_of, url_of
    from tinsmith.server.settings import ServerSettings, TinkerbellSettings, parse_dialects
    from tinsmith.types.engine_options import EngineOptions, ModelSource, parse_size
    from tinsmith.types.errors import TinsmithError

    os.environ[FORMAT_VARIABLE] = log_format
    configure_logging(log_format, log_level)
    try:
        sources = [ModelSource.parse(text) for text in base_model or ["tinsmith/tiny"]]
        tls, is_open = tls_of(tls_certificate, tls_key), not is_loopback(host)
        settings = ServerSettings(
            keys_required=is_open,
            loopback_hosts_only=True,
            dialects=parse_dialects(dialect),
            tinkerbell=TinkerbellSettings(auto_create=auto_create),
            record_folder=record,
        )
        listener = bind(host, port)
        allow_many_connections()
        options = EngineOptions(
            dtype=dtype,
            device=device,
            threads=threads,
            deterministic=deterministic,
            adapter_memory_bytes=None if adapter_memory is None else parse_size("--adapter-memory", adapter_memory),
        )
        recovery = {
            "keys_required": is_open,
            "ledger": ledger,
            "snapshot_requests": snapshot_requests,
            "health": HealthSettings(is_on=True),
        }
        stores = {
            "database": database,
            "checkpoints": checkpoints,
            "checkpoint_cache_bytes": int(checkpoint_cache * 1e9),
            "keep_checkpoints": keep_checkpoints,
            "checkpoint_bytes_max": checkpoint_budget and parse_size("--checkpoint-budget", checkpoint_budget),
        }
        tracing = open_tracing(otel_endpoint)
        control = open_control(sources, options, data_dir or default_data_dir(), home="process", **recovery, **stores)
        url = url_of(listener, "http" if tls is None else "https")
        names = ", ".join(source.name for source in sources)

        def tell_ready() -> None:
            key = "" if control.accounts.has_keys else f" TINKER_API_KEY={LOCAL_API_KEY}"
            print(f"Serving {names} at {url}  TINKER_BASE_URL={url}{key}", flush=True)
            if is_open and tls is None:
                say("keys travel in the clear: give --tls-certificate and --tls-key, or let a proxy speak TLS")

        app = create_app(control, settings, tracing)
        say = print_aside if log_format == "text" else logging.getLogger("tinsmith.server").warning
        run_app(app, listener, on_ready=tell_ready, say=say, tls=tls)
    except TinsmithError as error:
        typer.echo(f"tinsmith serve: {error}", err=True)
        raise typer.Exit(1) from error
