"""The Python code of the page on OpenAI and Anthropic clients runs against a server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.protocol.conftest import ROOT, ChatServer

PAGE = ROOT / "docs" / "chat-apis.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_code_block_runs(number: int, chat_server: ChatServer, tmp_path: Path) -> None:
    (tmp_path / "trajectories").symlink_to(chat_server.records)
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[number].replace("http://127.0.0.1:8000", chat_server.url)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
