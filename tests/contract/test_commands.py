"""The commands about a server, against the embedded one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open
from typer.testing import CliRunner, Result

import tinsmith as tinker
from tinsmith.cli.app import app
from tinsmith.client.downloads import Progress, download_checkpoint


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"local:?data_dir={tmp_path_factory.mktemp('data')}&dtype=float32"


@pytest.fixture(scope="module")
def service(address: str) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=address) as client:
        yield client


@pytest.fixture(scope="module")
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    client = service.create_lora_training_client("tinsmith/tiny", rank=4, seed=1).result(60)
    for name in ("a", "b", "c"):
        client.save_state(name, user_metadata={"colour": "red"}).result(60)
    client.save_weights_for_sampler("s").result(60)
    return client


def tinsmith(address: str, *arguments: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, [*arguments, "--base-url", address], input=answer)


def told(address: str, *arguments: str) -> Any:
    result = tinsmith(address, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def path(training: tinker.TrainingClient, name: str) -> str:
    return f"tinker://{training.model_id}/weights/{name}"


def test_runs_models_sessions_and_samplers_are_listed(
    address: str, service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    assert training.model_id in {run["training_run_id"] for run in told(address, "run", "list")}
    assert told(address, "run", "info", training.model_id)["lora_rank"] == 4
    assert "tinsmith/tiny" in tinsmith(address, "model", "list").stdout
    assert told(address, "model", "list", "no-such") == []
    session = training.model_id.partition(":")[0]
    assert session in {one["session_id"] for one in told(address, "session", "list", "--limit", "0")}
    assert training.model_id in told(address, "session", "info", session)["training_run_ids"]
    sampler = service.create_sampling_client(base_model="tinsmith/tiny").result(60)
    assert sampler.get_base_model() == "tinsmith/tiny"
    (listed,) = told(address, "sampler", "list", "--session", session)
    assert told(address, "sampler", "info", listed["sampler_id"])["base_model"] == "tinsmith/tiny"


def test_checkpoints_are_listed_newest_first_and_limited(address: str, training: tinker.TrainingClient) -> None:
    names = [one["checkpoint_id"] for one in told(address, "checkpoint", "list", "--run-id", training.model_id)]
    assert names[:4] == ["sampler_weights/s", "weights/c", "weights/b", "weights/a"]
    assert len(told(address, "checkpoint", "list", "--limit", "2")) == 2
    shown = tinsmith(address, "checkpoint", "list", "--limit", "0").stdout
    assert path(training, "a") in shown
    info = told(address, "checkpoint", "info", path(training, "a"))
    assert (info["lora_rank"], info["user_metadata"], info["base_model"]) == (4, {"colour": "red"}, "tinsmith/tiny")


def test_a_checkpoint_is_published_given_a_time_to_live_and_deleted(
    address: str, training: tinker.TrainingClient
) -> None:
    training.save_state("doomed").result(60)
    doomed = path(training, "doomed")
    told(address, "checkpoint", "publish", doomed)
    assert told(address, "checkpoint", "info", doomed)["public"] is True
    told(address, "checkpoint", "unpublish", doomed)
    told(address, "checkpoint", "set-ttl", doomed, "--ttl", "3600")
    assert told(address, "checkpoint", "info", doomed)["expires_at"] is not None
    told(address, "checkpoint", "set-ttl", doomed, "--remove")
    assert told(address, "checkpoint", "info", doomed)["expires_at"] is None
    refused = tinsmith(address, "checkpoint", "delete", doomed, answer="n\n")
    assert refused.exit_code == 1
    assert told(address, "checkpoint", "info", doomed)["public"] is False
    assert told(address, "checkpoint", "delete", doomed, "--yes") == {"deleted": [doomed]}
    assert tinsmith(address, "checkpoint", "info", doomed).exit_code == 1


def test_what_was_deleted_is_told_beside_what_was_not(address: str, service: tinker.ServiceClient) -> None:
    client = service.create_lora_training_client("tinsmith/tiny", rank=2).result(60)
    client.save_state("x").result(60)
    delete = ("checkpoint", "delete", path(client, "nosuch"), path(client, "x"), "--yes")
    malformed = tinsmith(address, *delete, "weights/y")
    assert malformed.exit_code == 1
    assert "deleted" not in malformed.output
    result = tinsmith(address, *delete)
    assert result.exit_code == 1
    assert f"deleted {path(client, 'x')}" in result.output
    assert "nosuch" in result.output
    assert told(address, "checkpoint", "list", "--run-id", client.model_id) == []


def test_deleting_by_run_obeys_its_filters(address: str, service: tinker.ServiceClient) -> None:
    client = service.create_lora_training_client("tinsmith/tiny", rank=2).result(60)
    client.save_state("x").result(60)
    client.save_weights_for_sampler("y").result(60)
    arguments = ("checkpoint", "delete", "--run-id", client.model_id, "--yes")
    assert told(address, *arguments, "--after", "2100-01-01") == {"deleted": []}
    assert told(address, *arguments, "--type", "sampler") == {
        "deleted": [f"tinker://{client.model_id}/sampler_weights/y"]
    }
    assert told(address, *arguments, "--before", "2100-01-01") == {"deleted": [path(client, "x")]}


WEIGHTS = "adapter_model.safetensors"


def download(address: str, path: str, folder: Path) -> bytes:
    result = tinsmith(address, "checkpoint", "download", path, "--output", str(folder))
    assert result.exit_code == 0, result.output
    return (folder / WEIGHTS).read_bytes()


def cut_off(service: tinker.ServiceClient, path: str, folder: Path) -> Path:
    """A download that ended within the weights; what there is of them."""

    def end(progress: Progress) -> None:
        if progress.file == WEIGHTS:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        download_checkpoint(service, path, folder, on_progress=end).result(60)
    (part,) = folder.glob(f"{WEIGHTS}*.part")
    return part


def test_a_download_has_the_adapter_and_goes_on_where_it_stopped(
    address: str, service: tinker.ServiceClient, training: tinker.TrainingClient, tmp_path: Path
) -> None:
    whole = download(address, path(training, "a"), tmp_path / "first")
    with safe_open(tmp_path / "first" / WEIGHTS, "numpy") as file:
        assert any("lora_A" in name for name in file.keys())  # noqa: SIM118
    second = tmp_path / "second"
    cut_off(service, path(training, "a"), second).write_bytes(bytes(1000))
    assert download(address, path(training, "a"), second) == bytes(1000) + whole[1000:]
    assert not list(second.glob("*.part"))
    names = [one["checkpoint_id"] for one in told(address, "checkpoint", "list", "--limit", "0")]
    assert "external_weights/download" not in names


def test_a_download_is_never_made_of_another_checkpoints_files(
    address: str, service: tinker.ServiceClient, training: tinker.TrainingClient, tmp_path: Path
) -> None:
    other = service.create_lora_training_client("tinsmith/tiny", rank=4, seed=2).result(60)
    other.save_state("a").result(60)
    first, second = (download(address, path(one, "a"), tmp_path / one.model_id) for one in (training, other))
    assert first != second
    folder = tmp_path / "a"
    assert download(address, path(training, "a"), folder) == first
    assert download(address, path(other, "a"), folder) == second
    cut_off(service, path(training, "a"), folder).write_bytes(first[:1000])
    assert download(address, path(other, "a"), folder) == second


def test_an_export_that_somebody_keeps_stays(
    address: str, service: tinker.ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client = service.create_lora_training_client("tinsmith/tiny", rank=2).result(60)
    client.save_state("x").result(60)
    with tinker.RestClient(base_url=address) as rest:
        kept = rest.export_merged(path(client, "x")).result(60).tinker_path
    assert told(address, "checkpoint", "export", path(client, "x"), "--merged")["folder"] == "x-merged"
    paths = [one["tinker_path"] for one in told(address, "checkpoint", "list", "--run-id", client.model_id)]
    assert sorted(paths) == sorted([kept, path(client, "x")])


def test_a_samplers_checkpoint_is_not_for_download(address: str, training: tinker.TrainingClient) -> None:
    result = tinsmith(address, "checkpoint", "download", f"tinker://{training.model_id}/sampler_weights/s")
    assert result.exit_code == 1
    assert "use the training checkpoint" in result.output
    assert "internal error" not in result.output


def test_an_adapter_is_pushed_with_a_model_card(
    address: str, training: tinker.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: dict[str, Any] = {}

    class Hub:
        def create_repo(self, repo: str, **options: Any) -> None:
            pushed["repo"] = (repo, options["private"])

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
            pushed["files"] = sorted(file.name for file in folder_path.iterdir())
            pushed["card"] = (folder_path / "README.md").read_text()
            return SimpleNamespace(commit_url=f"https://hub.test/{repo_id}")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    told(address, "checkpoint", "push-hf", path(training, "a"), "--repo", "me/adapter")
    assert pushed["repo"] == ("me/adapter", True)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(pushed["files"])
    assert "base_model: tinsmith/tiny" in pushed["card"]


def test_a_trace_is_fetched(address: str, training: tinker.TrainingClient, tmp_path: Path) -> None:
    session, file = training.model_id.partition(":")[0], tmp_path / "trace.json"
    assert told(address, "session", "export-trace", session, "--output", str(file)) == {"file": str(file)}
    assert json.loads(file.read_text())
    assert told(address, "session", "export-trace", session, "--url-only")["url"].startswith("http")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "info", "nosuch"), 1, "nosuch"),
        (("checkpoint", "set-ttl", "tinker://a/weights/b"), 2, "--ttl"),
        (("checkpoint", "delete"), 2, "--run-id"),
        (("checkpoint", "publish", "weights/x"), 1, "not a checkpoint path"),
        (("checkpoint", "delete", "--run-id", "r", "--type", "big"), 2, "big"),
        (("checkpoint", "delete", "tinker://a/weights/b", "--type", "sampler", "--yes"), 2, "--run-id"),
        (("checkpoint", "delete", "tinker://a/weights/b", "--before", "2020-01-01", "--yes"), 2, "--run-id"),
    ],
)
def test_mistakes_have_exit_codes_and_words(address: str, arguments: tuple[str, ...], code: int, words: str) -> None:
    result = tinsmith(address, *arguments)
    assert result.exit_code == code
    assert words in result.output


def test_a_server_that_is_not_there_is_an_error_soon() -> None:
    result = tinsmith("http://127.0.0.1:9", "model", "list")
    assert result.exit_code == 1
    assert "tinsmith serve" in result.output


def test_recorded_events_are_shown_and_exported(tmp_path: Path) -> None:
    file = tmp_path / "e.jsonl"
    file.write_text('{"event": "operation.finished", "time": 1.0, "run_id": "r", "loss": 0.5}\n')
    run = CliRunner()
    assert "operation.finished" in run.invoke(app, ["events", "show", str(file)]).stdout
    result = run.invoke(app, ["events", "export", str(file), str(tmp_path / "e.csv"), "--json"])
    assert json.loads(result.stdout)["rows"] == 1
    assert (tmp_path / "e.csv").read_text().startswith("event,time,run_id,loss")


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        ("{}\nno json\n", ("show", "e.jsonl"), "e.jsonl:2"),
        ("{}\n", ("show", "e.txt"), "no file of events"),
        ("{}\n", ("export", "e.jsonl", "e.xlsx"), ".csv or .parquet"),
    ],
)
def test_a_file_that_holds_no_events_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(words[1]).write_text(content)
    result = CliRunner().invoke(app, ["events", *words])
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())
