"""Free memory under the limits of control groups."""

from __future__ import annotations

from pathlib import Path

from tinsmith.engine.hardware import cgroup_available_bytes


def _group(folder: Path, limit: str, usage: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file 0\ninactive_file {cached}\n")


def test_the_tightest_enclosing_group_counts_and_its_page_cache_is_free(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/tenant/job\n")
    root = tmp_path / "cgroup"
    _group(root / "tenant" / "job", "max", 400)
    _group(root / "tenant", "1000", 700, cached=200)
    assert cgroup_available_bytes(root, membership) == 500


def test_without_a_limit_nothing_is_said(tmp_path: Path) -> None:
    _group(tmp_path / "cgroup", "max", 700)
    assert cgroup_available_bytes(tmp_path / "cgroup", tmp_path / "nothing") is None
    assert cgroup_available_bytes(tmp_path / "no-such-folder", tmp_path / "nothing") is None


def test_the_first_version_of_control_groups_is_read_too(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("2000\n")
    (folder / "memory.usage_in_bytes").write_text("500\n")
    (folder / "memory.stat").write_text("cache 5\nactive_file 100\ninactive_file 0\n")
    assert cgroup_available_bytes(tmp_path, tmp_path / "nothing") == 1600
    (folder / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert cgroup_available_bytes(tmp_path, tmp_path / "nothing") is None
