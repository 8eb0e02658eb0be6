"""The page that `make compat` writes."""

from __future__ import annotations

from pathlib import Path

from scripts.compat import VERSIONS, Column, Outcome, page

WORKS = Outcome(state="works", why="")
REFUSED = Outcome(
    state="refused", why="RequestFailedError: Request failed: colour is not supported for self.request_id='x'"
)


def test_the_page_says_per_version_what_works_and_why_not() -> None:
    old = Column(version="0.1.0", is_newest=False, rows={"RestClient.list": WORKS})
    new_rows = {"RestClient.list": WORKS, "RestClient.list_async": REFUSED, "ServiceClient.close": WORKS, "a: b": WORKS}
    text = page([old, Column(version="0.2.0", is_newest=True, rows=new_rows)])
    assert "| `list` | ✓ | refused |" in text
    assert "list_async` |" not in text, "a twin has no row of its own"
    assert "| `close` |  | ✓ |" in text
    assert "| a: b |  | ✓ |" in text
    assert "| 0.2.0 (newest) | 4 | 3 | 1 | 0 | 0 |" in text
    assert "| all | 5 | 4 | 1 | 0 | 0 |" in text
    assert "* **RestClient.list_async** (0.2.0): colour is not supported\n" in text


def test_the_page_in_the_docs_has_every_version_and_no_failure() -> None:
    text = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    for version in VERSIONS[:-1]:
        assert f"| {version}." in text
    totals = next(line for line in text.splitlines() if line.startswith("| all |")).split("|")
    assert int(totals[2]) > 600
    assert int(totals[6]) == 0
