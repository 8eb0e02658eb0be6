"""The hub port over Hugging Face's, and tokenizers from it."""

from __future__ import annotations

from pathlib import Path

from tinsmith.data import ChatTokenizer, load_tokenizer
from tinsmith.kitchen.ports import HubClient, TokenizerClient
from tinsmith.types.errors import NotFound


class HuggingFaceHub(HubClient):
    """Needs the package `huggingface_hub`; the token is the environment's. Not tested against the live hub."""

    def download(self, repo: str, file: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        try:
            return Path(hf_hub_download(repo, file))
        except (EntryNotFoundError, RepositoryNotFoundError) as error:
            raise NotFound(f"no file {file!r} in {repo!r}") from error

    def snapshot(self, repo: str) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return Path(snapshot_download(repo))
        except RepositoryNotFoundError as error:
            raise NotFound(f"no repository {repo!r}") from error

    def list_files(self, repo: str) -> list[str]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return sorted(HfApi().list_repo_files(repo))
        except RepositoryNotFoundError as error:
            raise NotFound(f"no repository {repo!r}") from error

    def upload(self, repo: str, file: str, data: bytes) -> None:
        from huggingface_hub import HfApi

        HfApi().upload_file(path_or_fileobj=data, path_in_repo=file, repo_id=repo)


class HubTokenizers(TokenizerClient):
    """Of `tinsmith/tiny`, a local folder, or a Hugging Face id."""

    def get_tokenizer(self, model: str) -> ChatTokenizer:
        return load_tokenizer(model)
