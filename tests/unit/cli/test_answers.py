"""Tables of the commands about a server."""

from __future__ import annotations

import pytest

from tinsmith.cli.answers import show

PATHS = [f"tinker://sess-0123456789ab:train:0/weights/{name}" for name in ("first", "second")]
ROWS = [{"path": path, "step": 3, "note": None} for path in PATHS]
COLUMNS = {"path": "path", "step": "step", "note": "note"}


@pytest.mark.parametrize("width", [40, 120])
def test_a_terminal_of_any_width_shows_paths_whole(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": str(width)}.items():
        monkeypatch.setenv(name, value)
    show(ROWS, COLUMNS, as_json=False, empty="none")
    shown = capsys.readouterr().out
    assert all(path in shown for path in PATHS)
    if width == 40:
        assert shown.splitlines()[:3] == [PATHS[0], "  step  3", PATHS[1]]
