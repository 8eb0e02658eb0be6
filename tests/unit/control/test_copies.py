"""Copies of checkpoints into a run that the client names."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.control.harness import Harness
from tests.unit.control.restarts import Server, running
from tinsmith.control.copies import CopyOrder
from tinsmith.control.requests import SaveState
from tinsmith.types.errors import AlreadyExists

pytestmark = pytest.mark.anyio


async def saved(h: Harness, model_id: str, seq_id: int, name: str) -> str:
    path: str = await h.result(h.submit(SaveState(model_id=model_id, seq_id=seq_id, name=name)))
    return path


async def test_of_two_copies_into_one_run_at_once_the_second_is_refused_and_the_first_stays_whole(h: Harness) -> None:
    library, session_id = h.control.library, await h.session()
    path = await saved(h, await h.model(session_id), 1, "a")
    order = CopyOrder(source_path=path, session_id=session_id, model_seq_id=7)
    copies = await asyncio.gather(*(library.copy_weights(order, None) for _ in range(2)), return_exceptions=True)
    (copy,) = [copy for copy in copies if isinstance(copy, str)]
    (error,) = [error for error in copies if not isinstance(error, str)]
    assert isinstance(error, AlreadyExists)
    run_id = copy.removeprefix("tinker://").partition("/")[0]
    _, files = await library.checkpoint_files(run_id, "weights/a")
    assert len(files) > 1


async def test_a_copy_whose_answer_was_lost_with_the_server_is_found_again(server: Server) -> None:
    h = await server.start()
    session_id = await h.session()
    model_id = await h.model(session_id)
    path, other = await saved(h, model_id, 1, "a"), await saved(h, model_id, 2, "b")
    order = CopyOrder(source_path=path, session_id=session_id, model_seq_id=7)
    copy = await h.control.library.copy_weights(order, "key")
    await server.kill(h)
    async with running(server) as h:
        assert await h.control.library.copy_weights(order, "key") == copy
        with pytest.raises(AlreadyExists, match="take the next model_seq_id"):
            await h.control.library.copy_weights(
                CopyOrder(source_path=other, session_id=session_id, model_seq_id=7), None
            )
