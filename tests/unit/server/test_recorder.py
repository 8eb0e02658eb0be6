"""What a recording server keeps of its chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.server.chat_server import HELLO, answer, events, post, tiny_card
from tests.unit.server.tinker_client import OpenServer
from tinsmith.data import DataError, Trajectory, read_trajectories
from tinsmith.runtime.fake import FAKE_CARD
from tinsmith.server.chat.recorder import Recorder
from tinsmith.types.errors import InvalidInput

pytestmark = pytest.mark.anyio


async def test_every_sample_of_every_dialect_is_kept_token_for_token(open_server: OpenServer, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    async with open_server(card=tiny_card(), record_folder=folder) as chat:
        body = {"messages": HELLO, "max_tokens": 3, "seed": 5, "n": 2, "return_token_ids": True, "temperature": 0.5}
        whole = await answer(chat.http, "chat/completions", body, **{"x-conversation-id": "episode-7"})
        await events(chat.http, "completions", {"prompt": [5, 7], "max_tokens": 2, "seed": 1})
        await answer(chat.http, "messages", {"messages": HELLO, "max_tokens": 4, "seed": 1})
        await answer(chat.http, "completions", {"prompt": "only scored", "max_tokens": 0, "echo": True, "logprobs": 1})
        kept = list(read_trajectories(folder))
    assert [len(one.tokens) for one in kept] == [3, 3, 2, 4]
    first = kept[0]
    assert first.request_id == whole["id"]
    assert [one.conversation_id for one in kept] == ["episode-7", "episode-7", None, None]
    assert list(first.prompt_tokens) == whole["prompt_token_ids"]
    assert [list(one.tokens) for one in kept[:2]] == [choice["token_ids"] for choice in whole["choices"]]
    assert all(lp < 0 for one in kept for lp in one.logprobs)
    assert (first.model, first.base_model, first.adapter_digest) == (FAKE_CARD.name, FAKE_CARD.name, None)
    assert first.sampling == {"temperature": 0.5, "top_p": 1.0, "top_k": -1, "seed": 5, "max_tokens": 3}
    assert kept[2].prompt_tokens == (5, 7)
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o077 == 0, "what users said is not for everybody on the machine"


async def test_the_adapter_is_named_by_its_digest(open_server: OpenServer, tmp_path: Path) -> None:
    async with open_server(card=tiny_card(), record_folder=tmp_path / "kept") as chat:
        model_id = await chat.model()
        save = {"model_id": model_id, "seq_id": 1, "path": "mine"}
        path = (await chat.result(await chat.post("save_weights_for_sampler", save)))["path"]
        await answer(chat.http, "chat/completions", {"model": path, "messages": HELLO, "max_tokens": 1})
        row = await chat.app.state.service.control.library.find_checkpoint(path)
        (kept,) = read_trajectories(tmp_path / "kept")
    assert kept.model == path
    assert kept.adapter_digest == row.digest


class FullDisk:
    """Takes ten bytes of every line."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, line: bytes) -> int:
        return self.file.write(line[:10])

    def truncate(self, size: int) -> None:
        self.file.truncate(size)


async def test_what_cannot_be_recorded_is_not_answered(open_server: OpenServer, tmp_path: Path) -> None:
    async with open_server(card=tiny_card(), record_folder=tmp_path / "kept") as chat:
        recorder = chat.app.state.service.recorder
        disk = recorder._file
        recorder._file = FullDisk(disk)
        response = await post(chat.http, "chat/completions", {"messages": HELLO, "max_tokens": 1})
        assert response.status_code == 500
        assert "could not be recorded" in response.json()["error"]["message"]
        recorder._file = disk
        await answer(chat.http, "chat/completions", {"messages": HELLO, "max_tokens": 1})
        assert len(list(read_trajectories(tmp_path / "kept"))) == 1, "no half line is left"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot record"):
        Recorder(tmp_path / "file")


def test_a_trajectory_becomes_a_datum(tmp_path: Path) -> None:
    one = Trajectory(
        request_id="r", conversation_id=None, model="m", base_model="m", adapter_digest=None, sampling={},
        prompt_tokens=(1, 2, 3), tokens=(4, 5), logprobs=(-0.25, -0.5), stop_reason="stop",
    )  # fmt: skip
    datum = one.datum(advantage=2.0)
    assert datum.model_input.to_ints() == [1, 2, 3, 4]
    inputs = {name: tensor.to_numpy().tolist() for name, tensor in datum.loss_fn_inputs.items()}
    assert inputs == {
        "target_tokens": [2, 3, 4, 5],
        "logprobs": [0.0, 0.0, -0.25, -0.5],
        "advantages": [0.0, 0.0, 2.0, 2.0],
    }


def test_a_line_that_is_no_trajectory_is_named(tmp_path: Path) -> None:
    (tmp_path / "trajectories-1.jsonl").write_text('{"format": 2}\n')
    with pytest.raises(DataError, match="line 1: format is 2"):
        list(read_trajectories(tmp_path))
    (tmp_path / "trajectories-1.jsonl").write_text('{"format": 1}\n')
    with pytest.raises(DataError, match="not a recorded trajectory"):
        list(read_trajectories(tmp_path))
    (tmp_path / "trajectories-1.jsonl").write_text('{"format": 1, "req')
    assert list(read_trajectories(tmp_path)) == [], "a line that is being written"
