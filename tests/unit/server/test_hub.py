"""The hub route: tokenizer and config files of served models, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.server.chat_server import tiny_card
from tests.unit.server.tinker_client import Client, OpenServer
from tinsmith.models import tiny_folder
from tinsmith.server.hub.repositories import Repositories

pytestmark = pytest.mark.anyio

NAME = "acme/private"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "private"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        (folder / name).write_bytes((tiny_folder() / name).read_bytes())
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "training_args.json").write_text("{}")
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (tmp_path / "models" / "secret.json").write_text("{}")
    return folder


@pytest.fixture
async def hub(open_server: OpenServer, folder: Path) -> AsyncIterator[Client]:
    async with open_server(card=tiny_card(folder, name=NAME)) as opened:
        yield opened


async def test_a_file_comes_with_what_the_hub_tells_of_it(hub: Client, folder: Path) -> None:
    content = (folder / "tokenizer.json").read_bytes()
    url = f"/hf/{NAME}/resolve/main/tokenizer.json"
    got, asked = await hub.http.get(url), await hub.http.head(url)
    assert got.content == content
    assert asked.content == b""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    for response in (got, asked):
        assert response.status_code == 200
        assert response.headers["etag"] == f'"{oid}"'
        assert response.headers["content-length"] == str(len(content))
        assert len(response.headers["x-repo-commit"]) == 40
    part = await hub.http.get(url, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, content[10:20])
    at_commit = await hub.http.get(url.replace("main", got.headers["x-repo-commit"]))
    assert at_commit.content == content


async def test_only_tokenizer_and_config_files_are_listed(hub: Client) -> None:
    model = (await hub.http.get(f"/hf/api/models/{NAME}")).json()
    names = [file["rfilename"] for file in model["siblings"]]
    assert names == ["additional_chat_templates/rag.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]
    assert (await hub.http.get(f"/hf/api/models/{NAME}/revision/{model['sha']}")).json() == model
    tree = (await hub.http.get(f"/hf/api/models/{NAME}/tree/main?recursive=true")).json()
    assert [entry["path"] for entry in tree if entry["type"] == "file"] == names
    top = (await hub.http.get(f"/hf/api/models/{NAME}/tree/main")).json()
    assert [entry["path"] for entry in top] == ["additional_chat_templates", *names[1:]]
    inner = (await hub.http.get(f"/hf/api/models/{NAME}/tree/main/additional_chat_templates")).json()
    assert [entry["path"] for entry in inner] == names[:1]


@pytest.mark.parametrize(
    "path",
    [
        "model.safetensors",
        "training_args.json",
        "README.md",
        "none.json",
        "%2e%2e/secret.json",
        "..%2fsecret.json",
        "additional_chat_templates/%2e%2e/%2e%2e/secret.json",
        "additional_chat_templates/%2e%2e/config.json",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "config.json%00.txt",
        "",
    ],
)
async def test_nothing_else_can_be_read(hub: Client, path: str) -> None:
    for prefix in (f"/hf/{NAME}/resolve/main/", f"/hf/api/models/{NAME}/tree/main/x/"):
        response = await hub.http.get(prefix + path)
        assert response.status_code == 404, response.text
        assert response.headers.get("x-error-code") in ("EntryNotFound", None)


async def test_what_is_missing_is_told_as_the_hub_tells_it(hub: Client) -> None:
    for url, code in [
        (f"/hf/{NAME}/resolve/main/merges.txt", "EntryNotFound"),
        (f"/hf/{NAME}/resolve/v2/config.json", "RevisionNotFound"),
        ("/hf/acme/other/resolve/main/config.json", "RepoNotFound"),
        ("/hf/api/models/acme/other", "RepoNotFound"),
        (f"/hf/api/models/{NAME}/tree/main/subfolder", "EntryNotFound"),
    ]:
        response = await hub.http.get(url)
        assert (response.status_code, response.headers["x-error-code"]) == (404, code)


async def test_a_changed_file_is_another_commit(hub: Client, folder: Path) -> None:
    url = f"/hf/{NAME}/resolve/main/config.json"
    before = await hub.http.head(url)
    changed = json.loads((folder / "config.json").read_text()) | {"changed": True}
    (folder / "config.json").write_text(json.dumps(changed))
    after = await hub.http.get(url)
    assert after.json() == changed
    assert after.headers["x-repo-commit"] != before.headers["x-repo-commit"]
    assert after.headers["etag"] != before.headers["etag"]


def test_a_client_is_given_a_name_that_it_can_load(folder: Path) -> None:
    assert tiny_card(folder, name=NAME).tokenizer_id == str(folder)
    assert tiny_card(Path("/models/a:b"), name=NAME).tokenizer_id == NAME, "the SDK cuts at a colon"


def test_a_link_out_of_the_folder_is_followed_only_where_the_operator_put_it(folder: Path, tmp_path: Path) -> None:
    """The hub's own cache is made of such links."""
    (tmp_path / "blob").write_text("{}")
    (folder / "vocab.json").symlink_to(tmp_path / "blob")
    (folder / "other.json").symlink_to(tmp_path / "blob")
    files = Repositories().open(tiny_card(folder)).files
    assert "vocab.json" in files
    assert "other.json" not in files
