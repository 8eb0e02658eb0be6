"""The program's own log: text for people, JSON for machines, with the ids of the present work."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from tinsmith.observe.logs import LogFormat, configure_logging, note, noting


@pytest.fixture
def log_to() -> Iterator[io.StringIO]:
    root, ours = logging.getLogger(), logging.getLogger("tinsmith")
    before = list(root.handlers), root.level, ours.level
    yield io.StringIO()
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def logged(stream: io.StringIO, log_format: LogFormat) -> None:
    configure_logging(log_format, "info", stream=stream)
    logger = logging.getLogger("tinsmith.server.requests")
    with noting():
        note(request_id="r-1", model_id="sess-1:train:0", session_id=None)
        logger.info("POST %s %d", "/api/v1/asample", 200, extra={"fields": {"status": 200}})
    logger.debug("not shown")
    logger.warning("outside")


def test_a_line_of_text_ends_with_the_ids(log_to: io.StringIO) -> None:
    logged(log_to, "text")
    first, second = log_to.getvalue().splitlines()
    assert first.endswith(" INFO    server.requests: POST /api/v1/asample 200  request_id=r-1 model_id=sess-1:train:0")
    assert second.endswith(" WARNING server.requests: outside")


def test_a_line_of_json_has_ids_and_fields_as_keys(log_to: io.StringIO) -> None:
    logged(log_to, "json")
    first, second = (json.loads(line) for line in log_to.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "logger": "tinsmith.server.requests",
        "message": "POST /api/v1/asample 200",
        "request_id": "r-1",
        "model_id": "sess-1:train:0",
        "status": 200,
    }
    assert second["message"] == "outside"
    assert "request_id" not in second


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_callers_words_begin_no_line_and_move_no_cursor(log_to: io.StringIO, log_format: LogFormat) -> None:
    configure_logging(log_format, "info", stream=log_to)
    with noting():
        note(request_id="r-1\n12:00:00.000 ERROR   server: forged")
        logging.getLogger("tinsmith.server.requests").info("GET %s", "/x\r\n\x1b[2J")
    line = log_to.getvalue()
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert not {"\r", "\x1b"} & set(line)
    assert "forged" in line


def test_an_error_in_json_is_one_line_with_its_traceback(log_to: io.StringIO) -> None:
    configure_logging("json", stream=log_to)
    try:
        1 / 0
    except ZeroDivisionError:
        logging.getLogger("tinsmith.control").exception("it failed")
    (line,) = log_to.getvalue().splitlines()
    assert json.loads(line)["error"].endswith("ZeroDivisionError: division by zero")


def test_two_requests_at_once_keep_their_ids_apart_and_tasks_inherit_them(log_to: io.StringIO) -> None:
    configure_logging("json", "info", stream=log_to)

    async def work(name: str) -> None:
        with noting():
            note(request_id=name)
            await asyncio.sleep(0)
            await asyncio.create_task(below(name))

    async def below(name: str) -> None:
        await asyncio.sleep(0)
        logging.getLogger("tinsmith").info(name)

    async def both() -> None:
        await asyncio.gather(work("one"), work("two"))

    asyncio.run(both())
    lines = [json.loads(line) for line in log_to.getvalue().splitlines()]
    assert {line["message"]: line["request_id"] for line in lines} == {"one": "one", "two": "two"}
