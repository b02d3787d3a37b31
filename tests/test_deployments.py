"""What stands in deployments/, against the schemas of those who read it; none of them has to be here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from moa_ray import __version__
from tests.commands import ROOT
from tests.kuberay import schema_of

DEPLOYMENTS = ROOT / "deployments"
LAUNCHER = sorted((DEPLOYMENTS / "launcher").glob("*.yaml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_a_file_for_rays_cluster_launcher_holds_to_its_schema(path: Path) -> None:
    validate_config(prepare_config(read(path)))


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_no_launched_cluster_shows_its_dashboard_or_goes_without_a_token(path: Path) -> None:
    config = read(path)
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0] and "~/.ray/auth_token" in config["file_mounts"]


def test_the_batch_on_kubernetes_holds_to_the_schema_of_the_operator() -> None:
    job = read(DEPLOYMENTS / "rayjob.yaml")
    jsonschema.validate(job, schema_of("rayjob"), jsonschema.Draft202012Validator)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__


def test_compose_publishes_on_loopback_alone_needs_a_key_and_drops_what_it_can() -> None:
    services = read(DEPLOYMENTS / "compose.yaml")["services"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    server = services["moa-ray"]
    assert server["cap_drop"] == ["ALL"] and ":?" in server["environment"]["MOA_RAY_API_KEYS"]
    assert not any("privileged" in service for service in services.values())


def test_the_script_for_slurm_is_one_and_its_command_is_ours() -> None:
    path = DEPLOYMENTS / "slurm.sh"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert 'moa-ray serve "$spec" --address auto --host' in path.read_text()


def test_every_image_of_ours_has_the_version_of_the_package() -> None:
    found = {
        (path.name, version)
        for path in DEPLOYMENTS.rglob("*")
        if path.is_file()
        for version in re.findall(r"moa-ray:(\d+\.\d+\.\d+)", path.read_text())
    }
    assert len(found) >= 4 and {version for _, version in found} == {__version__}


def test_what_is_checked_of_every_change_is_what_the_makefile_has() -> None:
    checks = read(ROOT / ".github" / "workflows" / "checks.yml")
    targets = checks["jobs"]["make"]["strategy"]["matrix"]["target"]
    made = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(targets) <= made and {name for name in made if name.startswith("test")} <= set(targets)
