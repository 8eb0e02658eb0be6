"""What of a base model's folder is shown: the files that a tokenizer and a config are made of, never weights.

A request names a file by its place in this list and nothing else, so no path can lead out of the folder.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tinsmith.types.errors import NotFound
from tinsmith.types.operations import BaseModelCard

SHOWN = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "*.bpe.model",
    "spiece.model",
    "spm.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenization_*.py",
    "configuration_*.py",
)
"""Patterns of paths inside a model's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    path: str
    """Inside the repository, with `/`."""
    location: Path
    size: int
    oid: str
    """As git names the content: 40 hexadecimal digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    name: str
    files: Mapping[str, HubFile]
    commit: str
    """Changes when any file does."""


class Repositories:
    """Of all served models; a file is read again when its size or time has changed. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._oids: dict[tuple[str, int, int], str] = {}

    def open(self, card: BaseModelCard) -> Repository:
        """Raises `NotFound` if the model's files are not on this machine any more."""
        folder = _folder(card)
        with self._lock:
            files = {path: self._file(path, folder / path) for path in sorted(_shown(folder))}
        content = "".join(f"{file.oid} {path}\n" for path, file in files.items())
        commit = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        return Repository(name=card.name, files=files, commit=commit)

    def _file(self, path: str, location: Path) -> HubFile:
        status = location.stat()
        key = (str(location), status.st_size, status.st_mtime_ns)
        if key not in self._oids:
            self._oids[key] = git_oid(location.read_bytes())
        return HubFile(path=path, location=location, size=status.st_size, oid=self._oids[key])


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _folder(card: BaseModelCard) -> Path:
    """Of the model's files; a hub id's are in the hub's cache on this machine."""
    if os.path.isabs(card.source):
        return Path(card.source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(card.source, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise NotFound(f"the files of {card.name!r} are not on the server") from error


def _shown(folder: Path) -> Iterator[str]:
    candidates = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    for candidate in candidates:
        path = candidate.relative_to(folder).as_posix()
        if candidate.is_file() and any(fnmatchcase(path, pattern) for pattern in SHOWN):
            yield path
