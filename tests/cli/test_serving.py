from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
from pathlib import Path

import httpx2
import openai
import psutil
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.commands import COMMAND, environment, moa_ray
from tests.conftest import HTTP_PORT
from tests.engines.test_registry import SPEC

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "g.yaml"
    path.write_text(SPEC.replace("model: m", 'model: m, reply: "{agent} says so."'))
    return path


@pytest.fixture
def address(ray_cluster: None) -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_serve_prints_a_curl_line_that_works_and_ctrl_c_leaves_nothing(spec: Path) -> None:
    port = _free_port()
    command = [*COMMAND, "serve", str(spec), "--port", str(port), "--set", "drafts=true"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == f"g at http://127.0.0.1:{port}/v1\n"
        assert process.stdout.readline() == "\n"
        done = subprocess.run(shlex.split(process.stdout.readline()), capture_output=True, text=True, timeout=60)
        answer = json.loads(done.stdout)["choices"][0]["message"]
        assert answer["content"] == "chief says so." and "a says so." in answer["reasoning"]
        below = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in process.stderr.read()
    _, alive = psutil.wait_procs(below, timeout=15)
    assert not alive


def test_a_deployment_is_looked_at_scaled_updated_and_taken_down(spec: Path, address: str) -> None:
    where = ("--address", address)
    deploy = ("deploy", str(spec), *where, "--port", str(HTTP_PORT), "--route-prefix", "/cli")
    done = moa_ray(*deploy)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"g at http://127.0.0.1:{HTTP_PORT}/cli/v1"), (
        done.stderr
    )
    done = moa_ray("scale", "g", "s=2", *where)
    assert (done.returncode, done.stdout) == (0, "g: s=2\n"), done.stderr
    (status,) = json.loads(moa_ray("status", "g", "--json", *where).stdout)
    (engine,) = status["engines"]
    assert status["state"] == "RUNNING" and engine["replicas"] == {"wanted": 2, "alive": 2}
    assert "g/s" in (table := moa_ray("status", *where)).stdout and "2/2" in table.stdout
    spec.write_text(spec.read_text().replace("says so", "says no"))
    assert moa_ray(*deploy).returncode == 0
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{HTTP_PORT}/cli/v1", api_key="none")
    answer = client.chat.completions.create(model="g", messages=[{"role": "user", "content": "why?"}])
    assert answer.choices[0].message.content == "chief says no."
    assert moa_ray("delete", "g", *where).stdout == "g is gone\n"
    assert httpx2.get(f"http://127.0.0.1:{HTTP_PORT}/cli/health").status_code == 404
    gone = moa_ray("delete", "g", *where)
    assert gone.returncode == 2 and "there is no application 'g'" in gone.stderr


def test_what_a_dry_run_prints_is_a_file_for_serve_deploy(spec: Path) -> None:
    done = moa_ray("deploy", str(spec), "--dry-run", "--port", "8123", "--set", "max_queued=7")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(done.stdout))
    (app,) = schema.applications
    assert (app.name, schema.http_options.port, app.args["server"]) == ("g", 8123, {"max_queued": 7})
    assert app.args["graphs"] == [yaml.safe_load(spec.read_text())]


def test_the_file_in_deployments_is_what_a_dry_run_prints() -> None:
    done = moa_ray("deploy", "examples/quickstart.yaml", "--dry-run")
    written = Path("deployments/serve.yaml").read_text()
    assert yaml.safe_load(written) == yaml.safe_load(done.stdout)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--set", "max_queud=3"), "did you mean 'max_queued'?"),
        (("--set", "max_queued=many"), "--set: max_queued: must be a whole number"),
        (("--set", "max_queued"), "is not KEY=VALUE"),
        (("--set", "api_keys=sk-1"), "anybody who lists processes would see them"),
        (("--route-prefix", "nowhere"), "begin with a slash"),
        (("--api-keys-file", "/nowhere"), "/nowhere: the API keys cannot be read: No such file"),
        (("--port", "99999"), "Invalid value for '--port'"),
    ],
)
def test_a_wrong_option_is_told_before_anything_starts(spec: Path, args: tuple[str, ...], message: str) -> None:
    done = moa_ray("serve", str(spec), *args)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_two_graphs_of_one_name_cannot_be_served_together(spec: Path) -> None:
    done = moa_ray("serve", str(spec), str(spec))
    assert done.returncode == 2 and "several graphs are called 'g'" in done.stderr


def test_a_port_that_is_taken_is_told_at_once(spec: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = moa_ray("serve", str(spec), "--port", str(listener.getsockname()[1]))
    assert done.returncode == 1 and "cannot listen at 127.0.0.1" in done.stderr and "--port" in done.stderr


@pytest.mark.parametrize("wanted", ["s", "s=", "s=-1", "s=0", "s=3..2", "s=x", "=3"])
def test_a_number_of_replicas_that_makes_no_sense_is_refused(wanted: str) -> None:
    done = moa_ray("scale", "g", wanted, "--address", "127.0.0.1:1")
    assert done.returncode == 2, done.stderr


def test_an_open_server_beyond_loopback_makes_itself_a_key(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moa_ray.cli.serving import plan
    from moa_ray.cluster.session import Listen
    from moa_ray.graph import load

    def keys(host: str, **given: bool) -> int:
        made = plan([load(spec)], None, Listen(host, 1), "/", None, given.get("open_to_all", False), [])
        assert bool(made.generated_key) == bool(made.settings.api_keys)
        return len(made.settings.api_keys)

    assert (keys("127.0.0.1"), keys("localhost"), keys("::1")) == (0, 0, 0)
    assert (keys("0.0.0.0"), keys("10.1.2.3"), keys("example.org")) == (1, 1, 1)
    assert keys("0.0.0.0", open_to_all=True) == 0
