"""Models of the Hugging Face Hub, through `huggingface_hub`, whose cache, tokens and mirrors count."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2

from moa_ray.errors import ModelNotFound

_USUAL = "q4_k_m"  # what llama.cpp itself takes of a repository that offers many
_TIMEOUT_S = 10.0
_FAILURES = (httpx2.HTTPError, OSError, ValueError)  # huggingface_hub's own errors descend from these


def cached(name: str) -> Path | None:
    """The file of the Hugging Face id `name` that is here already, or None."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, _, file = name.partition(":")
    try:
        snapshot = Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    wanted = file or _choice([str(path.relative_to(snapshot)) for path in snapshot.rglob("*.gguf")])
    return snapshot / wanted if wanted and (snapshot / wanted).is_file() else None


def resolve(name: str, report: Callable[[int, int | None, str], None]) -> Path:
    """The file of the Hugging Face id `name`, fetched into the Hub's own cache where it is missing.

    Without a file in the name the Hub is asked what there is; where it cannot be reached, the cache is.

    Raises:
        ModelNotFound: If the Hub cannot be reached, or has no such file.
    """
    _require()
    from huggingface_hub import HfApi, hf_hub_download

    repo, _, file = name.partition(":")
    if file and (here := cached(name)):
        return here
    try:
        siblings = HfApi().model_info(repo, timeout=_TIMEOUT_S).siblings or []
        wanted = _check(repo, file, sorted(entry.rfilename for entry in siblings if entry.rfilename.endswith(".gguf")))
        return Path(hf_hub_download(repo, wanted, tqdm_class=_bar(wanted, report)))
    except _FAILURES as error:
        if here := cached(name):
            return here
        raise _unreachable(repo, error) from error


def snapshot(repo: str) -> Path:
    """A model's folder with its safetensors, tokenizer and configuration, in the Hub's own cache.

    Raises:
        ModelNotFound: If the Hub cannot be reached, or has no such model.
    """
    _require()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]))
    except _FAILURES as error:
        raise _unreachable(repo, error) from error


def fetch_exact(
    repo: str, file: str, revision: str, sha256: str, target: Path, report: Callable[[int, int | None, str], None]
) -> None:
    """Fetch one file to `target`, unless the Hub's own record already shows another checksum.

    Raises:
        ModelNotFound: If the Hub cannot be reached, or holds other bytes.
    """
    _require()
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # Asked first, without the retries of a download: an unreachable Hub is known at once.
        etag = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=_TIMEOUT_S).etag
        if etag is None or (len(etag) == len(sha256) and etag != sha256):  # small files have another kind of checksum
            raise ModelNotFound(f"Hugging Face {repo}: {file} has another checksum")
        path = hf_hub_download(
            repo, file, revision=revision, local_dir=target.parent, tqdm_class=_bar(f"{file} from Hugging Face", report)
        )
    except _FAILURES as error:
        raise _unreachable(repo, error) from error
    Path(path).replace(target)


def _check(repo: str, file: str, files: list[str]) -> str:
    """The file of `files` that is meant by `file`, which may be empty."""
    wanted = file if file in files else None if file else _choice(files)
    if wanted:
        return wanted
    if not files:
        raise ModelNotFound(f"{repo} has no GGUF file", hint="look for a repository whose name ends in -GGUF")
    if file:
        raise ModelNotFound(f"{repo} has no file {file}", hint=f"it has: {', '.join(files)}")
    raise ModelNotFound(f"{repo} has {len(files)} GGUF files", hint=f"name one, such as '{repo}:{files[0]}'")


def _choice(files: list[str]) -> str | None:
    """The file to take where the user named none: the only one, or the usual quantisation."""
    usual = [file for file in files if _USUAL in file.lower()]
    return next((some[0] for some in (files, usual) if len(some) == 1), None)


def _require() -> None:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModelNotFound("huggingface_hub is not installed", hint="pip install 'moa-ray[local]'")


def _unreachable(repo: str, error: Exception) -> ModelNotFound:
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(f"Hugging Face has no {repo} for you", hint="check the id; set HF_TOKEN if it is private")
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return ModelNotFound(f"Hugging Face gave no {repo}: {reason}", hint="check the id and the network, or give a path")


def _bar(label: str, report: Callable[[int, int | None, str], None]) -> type[Any]:
    """A progress bar class, as `huggingface_hub` wants one, that draws nothing and reports."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self._done, self._bytes = int(kwargs.get("initial") or 0), kwargs.get("total")

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)
            report(self._done, self._bytes, label)

    return Bar
