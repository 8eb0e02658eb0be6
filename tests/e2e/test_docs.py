"""The Python code in README and docs runs as it stands, and prints what the text beside it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEED_A_SERVER = ("chat-apis",)
"""Run in `tests/protocol/test_chat_docs.py`."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(page, block, id=f"{page.stem}-{number}")
    for page in PAGES
    if page.stem not in NEED_A_SERVER
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]
PROMISED = {"quick-start": "I am a kettle.<|im_end|>"}


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_a_code_block_runs(page: Path, code: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("TINKER_BASE_URL", "TINSMITH_BASE_URL")}
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**environment, "TINSMITH_DATA_DIR": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert PROMISED.get(page.stem, "") in shown.stdout


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
