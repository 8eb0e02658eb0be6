"""Tokenizers from the server's hub route, by programs that know nothing of it but `HF_ENDPOINT`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.protocol.conftest import ChatServer, Server
from tinsmith.data import load_tokenizer

LOAD = """
import json, sys
from transformers import AutoConfig, AutoTokenizer
names = sys.argv[1:]
for name in names:
    tokenizer = AutoTokenizer.from_pretrained(name)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello there, 12 é"}], tokenize=False)
    print(json.dumps({"name": name, "ids": tokenizer(prompt)["input_ids"], "size": len(tokenizer),
                      "config": AutoConfig.from_pretrained(name).model_type}))
"""
LIST = """
import json, sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
name = sys.argv[1]
api = HfApi()
info = api.model_info(name)
names = {}
for case, act in {
    "EntryNotFoundError": lambda: hf_hub_download(name, "model.safetensors"),
    "RevisionNotFoundError": lambda: hf_hub_download(name, "config.json", revision="other"),
    "RepositoryNotFoundError": lambda: hf_hub_download("acme/unknown", "config.json"),
}.items():
    try:
        act()
    except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError) as error:
        names[case] = [kind.__name__ for kind in type(error).__mro__]
print(json.dumps({
    "files": sorted(api.list_repo_files(name)),
    "siblings": sorted(file.rfilename for file in info.siblings),
    "snapshot": snapshot_download(name).rsplit("/", 1)[-1],
    "sha": info.sha,
    "exists": api.file_exists(name, "tokenizer.json"),
    "missing": names,
}))
"""
OFFICIAL = """
import json, tinker
client = tinker.ServiceClient().create_sampling_client(base_model="tinsmith/tiny")
print(json.dumps({"size": len(client.get_tokenizer())}))
"""


def run(python: str | Path, code: str, url: str, home: Path, *arguments: str, **extra: str) -> list[dict[str, Any]]:
    """What a fresh program with an empty cache printed, line by line."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    shown = subprocess.run(
        [str(python), "-c", code, *arguments],
        env={**environment, "HF_ENDPOINT": f"{url}/hf", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **extra},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    return [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]


def test_every_served_models_tokenizer_loads_by_its_name(chat_server: ChatServer, tmp_path: Path) -> None:
    names = [chat_server.plain, chat_server.with_tools]
    told = run(sys.executable, LOAD, chat_server.url, tmp_path, *names)
    ours: Any = load_tokenizer(chat_server.plain)
    prompt = "<|im_start|>user\nHello there, 12 é<|im_end|>\n"
    for name, one in zip(names, told, strict=True):
        assert one == {"name": name, "ids": ours(prompt)["input_ids"], "size": len(ours), "config": "qwen3"}


def test_the_hubs_own_client_lists_and_downloads(chat_server: ChatServer, tmp_path: Path) -> None:
    (told,) = run(sys.executable, LIST, chat_server.url, tmp_path, chat_server.with_tools)
    assert told["files"] == told["siblings"]
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= set(told["files"])
    assert not [name for name in told["files"] if "safetensors" in name]
    assert told["snapshot"] == told["sha"]
    assert told["exists"]
    for name, kinds in told["missing"].items():
        assert name in kinds
    assert len(told["missing"]) == 3


def test_the_official_sdk_finds_the_tokenizer_of_a_model_that_no_hub_has(
    server: Server, tinker_python: Path, tmp_path: Path
) -> None:
    extra = {key: value for key, value in server.environment.items() if key.startswith("TINKER_")}
    (told,) = run(tinker_python, OFFICIAL, server.url, tmp_path, **extra)
    assert told == {"size": 1536}
