"""`tinsmith run list|info`, `tinsmith session …`, `tinsmith model …`, `tinsmith sampler …`: what a server has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tinsmith.cli.answers import AsJson, BaseUrl, Limit, done, pages, rest_client, show, show_one

runs = typer.Typer(add_completion=False, no_args_is_help=True, help="Training runs on a server.")
sessions = typer.Typer(add_completion=False, no_args_is_help=True, help="Sessions on a server.")
models = typer.Typer(add_completion=False, no_args_is_help=True, help="Base models of a server.")
samplers = typer.Typer(add_completion=False, no_args_is_help=True, help="Samplers on a server.")

_RUN_COLUMNS = {
    "training_run_id": "run",
    "base_model": "base model",
    "lora_rank": "rank",
    "corrupted": "corrupted",
    "last_request_time": "last request",
    "checkpoint": "last checkpoint",
}
_MODEL_COLUMNS = {
    "model_name": "model",
    "max_context_length": "context",
    "trainable": "trainable",
    "sampleable": "sampleable",
}


@runs.command("list")
def list_runs(limit: Limit = 20, as_json: AsJson = False, base_url: BaseUrl = None) -> None:
    """List training runs, newest first."""
    with rest_client(base_url) as rest:
        found = pages(lambda count, offset: rest.list_training_runs(count, offset).result().training_runs, limit)
    rows = [
        {**run.model_dump(), "checkpoint": None if run.last_checkpoint is None else run.last_checkpoint.checkpoint_id}
        for run in found
    ]
    show(rows, _RUN_COLUMNS, as_json=as_json, empty="no training runs")


@runs.command("info")
def run_info(
    run_id: Annotated[str, typer.Argument(metavar="RUN")], as_json: AsJson = False, base_url: BaseUrl = None
) -> None:
    """Show one training run."""
    with rest_client(base_url) as rest:
        run = rest.get_training_run(run_id).result()
    row = run.model_dump()
    if not as_json:
        for name in ("last_checkpoint", "last_sampler_checkpoint"):
            row[name] = None if row[name] is None else row[name]["tinker_path"]
    show_one(row, as_json=as_json)


@sessions.command("list")
def list_sessions(limit: Limit = 20, as_json: AsJson = False, base_url: BaseUrl = None) -> None:
    """List sessions, newest first."""
    with rest_client(base_url) as rest:
        found = pages(lambda count, offset: rest.list_sessions(count, offset).result().sessions, limit)
    show([{"session_id": one} for one in found], {"session_id": "session"}, as_json=as_json, empty="no sessions")


@sessions.command("info")
def session_info(
    session_id: Annotated[str, typer.Argument(metavar="SESSION")], as_json: AsJson = False, base_url: BaseUrl = None
) -> None:
    """Show the runs and samplers of one session."""
    with rest_client(base_url) as rest:
        session = rest.get_session(session_id).result()
    show_one({"session_id": session_id, **session.model_dump()}, as_json=as_json)


@sessions.command("export-trace")
def export_trace(
    session_id: Annotated[str, typer.Argument(metavar="SESSION")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File. Default: SESSION.json.")] = None,
    url_only: Annotated[bool, typer.Option("--url-only", help="Print the address in place of fetching it.")] = False,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
) -> None:
    """Fetch the trace of a session's requests, as Perfetto and Chrome open it."""
    target = output or Path(f"{session_id}.json")
    with rest_client(base_url) as rest:
        url = rest.export_session_trace(session_id).result()
        if not url_only:
            target.write_bytes(rest.fetch_address(url).result())
    if url_only:
        done(url, as_json=as_json, url=url)
    else:
        done(f"{target}: open it in Perfetto or chrome://tracing", as_json=as_json, file=target)


@models.command("list")
def list_models(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="Only names that contain it.")] = None,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
) -> None:
    """List the base models that can be trained or sampled."""
    with rest_client(base_url) as rest:
        found = rest.get_server_capabilities().result().supported_models
    wanted = [one for one in found if text is None or text.lower() in (one.model_name or "").lower()]
    show([one.model_dump() for one in wanted], _MODEL_COLUMNS, as_json=as_json, empty="no such model")


@samplers.command("info")
def sampler_info(
    sampler_id: Annotated[str, typer.Argument(metavar="SAMPLER")], as_json: AsJson = False, base_url: BaseUrl = None
) -> None:
    """Show what one sampler samples from."""
    with rest_client(base_url) as rest:
        sampler = rest.get_sampler(sampler_id).result()
    show_one(sampler.model_dump(), as_json=as_json)


@samplers.command("list")
def list_samplers(
    session_id: Annotated[str, typer.Option("--session", help="The session they belong to.")],
    as_json: AsJson = False,
    base_url: BaseUrl = None,
) -> None:
    """List the samplers of a session."""
    with rest_client(base_url) as rest:
        ids = rest.get_session(session_id).result().sampler_ids
        rows: list[dict[str, Any]] = [rest.get_sampler(one).result().model_dump() for one in ids]
    columns = {"sampler_id": "sampler", "base_model": "base model", "model_path": "checkpoint"}
    show(rows, columns, as_json=as_json, empty="no samplers")
