"""`tinsmith checkpoint …`: what a server has stored, and getting it out."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tinsmith.cli.answers import AsJson, BaseUrl, Limit, Yes, confirm, done, pages, rest_client, show, show_one, size

if TYPE_CHECKING:
    from tinsmith.client import APIFuture, RestClient
    from tinsmith.client.errors import TinkerError
    from tinsmith.types import Checkpoint

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Checkpoints on a server: list, look at, publish, delete, download, import, export.",
)

_COLUMNS = {
    "tinker_path": "path",
    "version": "version",
    "step": "step",
    "figures": "metrics",
    "size": "size",
    "time": "saved",
    "expires_at": "expires",
    "kept": "kept",
}
_FIGURES = 3
_EXPORT_TTL_S = 86_400
DtypeChoice = Literal["float32", "bfloat16", "float16"]
_WIDTH = 32
PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="tinker://RUN/KIND/ADDRESS: a name, NAME~VERSION, ~latest, ~best(METRIC)")
]


@app.command("list")
def list_checkpoints(
    run_id: Annotated[str | None, typer.Option(help="Only those of one training run.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
) -> None:
    """List checkpoints, newest first."""
    with rest_client(base_url) as rest:
        found = _of_run(rest, run_id, limit) if run_id else _of_user(rest, limit)
    show([_row(one) for one in found], _COLUMNS, as_json=as_json, empty="no checkpoints")


@app.command()
def info(path: PathArgument, as_json: AsJson = False, base_url: BaseUrl = None) -> None:
    """Show one checkpoint, and the model it belongs to."""
    with rest_client(base_url) as rest:
        weights = rest.get_weights_info_by_tinker_path(path).result()
        row = _row(_find(rest, path))
    show_one({**row, **weights.model_dump(exclude_none=True)}, as_json=as_json)


@app.command()
def publish(path: PathArgument, as_json: AsJson = False, base_url: BaseUrl = None) -> None:
    """Let everybody read a checkpoint."""
    with rest_client(base_url) as rest:
        rest.publish_checkpoint_from_tinker_path(path).result()
    done(f"{path} is public", as_json=as_json, tinker_path=path, public=True)


@app.command()
def unpublish(path: PathArgument, as_json: AsJson = False, base_url: BaseUrl = None) -> None:
    """Make a checkpoint private again."""
    with rest_client(base_url) as rest:
        rest.unpublish_checkpoint_from_tinker_path(path).result()
    done(f"{path} is private", as_json=as_json, tinker_path=path, public=False)


@app.command()
def pin(path: PathArgument, as_json: AsJson = False, base_url: BaseUrl = None) -> None:
    """Keep a checkpoint, however many newer ones its run has."""
    with rest_client(base_url) as rest:
        rest.pin_checkpoint_from_tinker_path(path).result()
    done(f"{path} is pinned", as_json=as_json, tinker_path=path, pinned=True)


@app.command()
def unpin(path: PathArgument, as_json: AsJson = False, base_url: BaseUrl = None) -> None:
    """Let a checkpoint go as others do."""
    with rest_client(base_url) as rest:
        rest.unpin_checkpoint_from_tinker_path(path).result()
    done(f"{path} is not pinned", as_json=as_json, tinker_path=path, pinned=False)


@app.command("set-ttl")
def set_ttl(
    path: PathArgument,
    ttl: Annotated[int | None, typer.Option("--ttl", min=1, help="Seconds from now until it is deleted.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Let it live for ever.")] = False,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
) -> None:
    """Set or remove the time a checkpoint has to live."""
    if (ttl is None) != remove:
        raise typer.BadParameter("give --ttl SECONDS or --remove, one of the two")
    with rest_client(base_url) as rest:
        rest.set_checkpoint_ttl_from_tinker_path(path, ttl).result()
    words = f"{path} lives for ever" if ttl is None else f"{path} lives for {ttl} s"
    done(words, as_json=as_json, tinker_path=path, ttl_seconds=ttl)


@app.command()
def delete(
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH…", help="tinker://RUN/KIND/NAME")] = None,
    run_id: Annotated[
        str | None, typer.Option(help="All of one training run, as far as the filters let through.")
    ] = None,
    kind: Annotated[str | None, typer.Option("--type", help="Only training, sampler or external.")] = None,
    before: Annotated[datetime | None, typer.Option(help="Only those saved before (UTC).")] = None,
    after: Annotated[datetime | None, typer.Option(help="Only those saved after (UTC).")] = None,
    yes: Yes = False,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
) -> None:
    """Delete checkpoints, by path or by run."""
    from tinsmith.types import ParsedCheckpointTinkerPath

    if bool(paths) == bool(run_id):
        raise typer.BadParameter("give paths or --run-id, one of the two")
    if paths and (kind or before or after):
        raise typer.BadParameter("--type, --before and --after choose among those of a --run-id, not among paths")
    if kind not in (None, "training", "sampler", "external"):
        raise typer.BadParameter(f"--type must be training, sampler or external, not {kind!r}")
    with rest_client(base_url) as rest:
        doomed = list(paths or [])
        if run_id:
            doomed = [one.tinker_path for one in _of_run(rest, run_id, 0) if _passes(one, kind, before, after)]
        for path in doomed:
            ParsedCheckpointTinkerPath.from_tinker_path(path)
        if doomed:
            confirm(f"Delete {_counted(doomed)}?", yes=yes)
        deletions = {path: rest.delete_checkpoint_from_tinker_path(path) for path in doomed}
        errors = {path: error for path, deletion in deletions.items() if (error := _error_of(deletion)) is not None}
    deleted = [path for path in doomed if path not in errors]
    if deleted or not errors:
        done(f"deleted {_counted(deleted)}", as_json=as_json, deleted=deleted)
    if errors:
        raise next(iter(errors.values()))


@app.command()
def download(
    path: PathArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. Default: the checkpoint's name.")
    ] = None,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
) -> None:
    """Fetch a checkpoint in PEFT layout. A download that was cut off goes on where it stopped."""
    folder = output or Path(path.rpartition("/")[2])
    files = _download(path, folder, base_url, quiet=as_json)
    done(f"{folder}: {', '.join(file.name for file in files)}", as_json=as_json, folder=folder, files=files)


@app.command()
def export(
    path: PathArgument,
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model: base weights with the adapter merged into them.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. Default: the checkpoint's name and -merged.")
    ] = None,
    dtype: Annotated[DtypeChoice | None, typer.Option(help="Of every weight. Default: the base model's.")] = None,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
) -> None:
    """Fetch a checkpoint as a model of its own, which transformers and inference servers load without an adapter."""
    if not merged:
        raise typer.BadParameter("give --merged; the adapter alone is fetched by `tinsmith checkpoint download`")
    with rest_client(base_url) as rest:
        source = _find(rest, path).tinker_path
        name = f"{source.rpartition('/')[2].partition('~')[0]}-merged"
        made = rest.export_merged(source, f"{name}-download", dtype=dtype, ttl_seconds=_EXPORT_TTL_S).result()
        folder = output or Path(name)
        files = _download(made.tinker_path, folder, base_url, quiet=as_json)
        rest.delete_checkpoint_from_tinker_path(made.tinker_path).result()
    done(f"{folder}: {', '.join(file.name for file in files)}", as_json=as_json, folder=folder, files=files)


@app.command("import")
def import_adapter(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder in PEFT's layout, or a tar archive of one.")],
    name: Annotated[str | None, typer.Option(help="Of the checkpoint. Default: the folder's name.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The server's model it is for, if not the one that the adapter names.")
    ] = None,
    ttl: Annotated[int | None, typer.Option("--ttl", min=1, help="Seconds from now until it is deleted.")] = None,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
) -> None:
    """Make a checkpoint of an adapter that was trained elsewhere: to sample from and to train on."""
    with rest_client(base_url) as rest:
        try:
            made = rest.import_adapter(path, name, base_model=base_model, ttl_seconds=ttl).result()
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    done(made.tinker_path, as_json=as_json, **made.model_dump(exclude_none=True))


@app.command("push-hf")
def push_hf(
    path: PathArgument,
    repo: Annotated[str, typer.Option("--repo", help="OWNER/NAME on the Hugging Face hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
) -> None:
    """Push a checkpoint to the Hugging Face hub, as an adapter with a model card. Needs HF_TOKEN or a login there."""
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    with rest_client(base_url) as rest:
        base_model = rest.get_weights_info_by_tinker_path(path).result().base_model
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = {file.name for file in _download(path, folder, base_url, quiet=as_json)}
        if "adapter_config.json" not in names or not names & {"adapter_model.safetensors", "adapter_model.bin"}:
            raise typer.BadParameter(f"{path} is no adapter in PEFT layout: it has {', '.join(sorted(names))}")
        (folder / "README.md").write_text(_model_card(base_model), encoding="utf-8")
        hub = HfApi()
        hub.create_repo(repo, private=not public, exist_ok=True)
        commit = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Adapter for {base_model}")
    done(f"pushed to {commit.commit_url}", as_json=as_json, repo=repo, commit=commit.commit_url)


def _download(path: str, folder: Path, base_url: str | None, *, quiet: bool) -> list[Path]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    from tinsmith.client import ServiceClient, download_checkpoint
    from tinsmith.client.downloads import Progress

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Bars(*columns, console=Console(stderr=True), disable=quiet) as bars,
        ServiceClient(base_url=base_url) as service,
    ):
        tasks: dict[str, Any] = {}

        def draw(progress: Progress) -> None:
            if progress.file not in tasks:
                tasks[progress.file] = bars.add_task(progress.file[-_WIDTH:])
            bars.update(tasks[progress.file], completed=progress.received, total=progress.total)

        return download_checkpoint(service, path, folder, on_progress=draw).result()


def _error_of(deletion: APIFuture[None]) -> TinkerError | None:
    from tinsmith.client.errors import TinkerError

    try:
        deletion.result()
    except TinkerError as error:
        return error
    return None


def _of_user(rest: RestClient, limit: int) -> list[Checkpoint]:
    return pages(lambda count, offset: rest.list_user_checkpoints(count, offset).result().checkpoints, limit)


def _of_run(rest: RestClient, run_id: str, limit: int) -> list[Checkpoint]:
    found = rest.list_checkpoints(run_id).result().checkpoints
    newest = sorted(found, key=lambda one: one.time, reverse=True)
    return newest[:limit] if limit else newest


def _find(rest: RestClient, path: str) -> Checkpoint:
    """By its address; from the list of its run at a server that has no single ones."""
    from tinsmith.client.errors import APIStatusError
    from tinsmith.types import ParsedCheckpointTinkerPath
    from tinsmith.types.errors import NotFound

    try:
        return rest.get_checkpoint_by_tinker_path(path).result()
    except APIStatusError as error:
        if error.status_code != 405:
            raise
    run_id = ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id
    for one in rest.list_checkpoints(run_id).result().checkpoints:
        if one.tinker_path == path:
            return one
    raise NotFound(f"run {run_id} has no checkpoint {path}")


def _passes(one: Checkpoint, kind: str | None, before: datetime | None, after: datetime | None) -> bool:
    if kind is not None and one.checkpoint_type != kind:
        return False
    if before is not None and one.time >= before.replace(tzinfo=UTC):
        return False
    return after is None or one.time > after.replace(tzinfo=UTC)


def _row(one: Checkpoint) -> dict[str, Any]:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in list((one.metrics or {}).items())[:_FIGURES])
    kept = [word for word, is_so in (("public", one.public), ("pinned", one.pinned)) if is_so]
    return {**one.model_dump(), "size": size(one.size_bytes), "figures": figures or None, "kept": ", ".join(kept)}


def _counted(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths)} checkpoints"


def _model_card(base_model: str) -> str:
    return (
        f"---\nbase_model: {base_model}\nlibrary_name: peft\ntags:\n- lora\n- tinsmith\n---\n\n"
        f"A LoRA adapter for `{base_model}`, trained with Tinsmith.\n"
    )
