"""The file for KubeRay against the operator's own schema, Serve's, and what Ray would place where."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.schema import ServeDeploySchema

from moa_ray.errors import SpecError
from moa_ray.graph import from_dict
from moa_ray.graph.loader import loads
from moa_ray.server import kuberay
from moa_ray.server.kuberay import Group, Unit
from tests.commands import ROOT, moa_ray, tool
from tests.kuberay import schema_of
from tests.test_docs import commands

KUBERAY = ROOT / "deployments" / "kuberay"
GPU = {"kind": "vllm", "model": "org/model"}


@pytest.fixture(scope="module")
def schema() -> Any:
    return schema_of("rayservice")


def spec(**engines: Mapping[str, Any]) -> dict[str, Any]:
    agents = {f"a_{name}": {"engine": name} for name in engines}
    return {
        "version": 1,
        "name": "my_Panel",
        "engines": {name: dict(engine) for name, engine in engines.items()},
        "agents": agents,
        "layers": [list(agents)],
        "aggregator": next(iter(agents)),
    }


def service(written: dict[str, Any], **options: Any) -> tuple[str, Any, Any]:
    """The file's comment, the network policy and the service."""
    text = kuberay.manifests([from_dict(written)], [written], "my_Panel", "applications: []\n", image="i:1", **options)
    policy, made = yaml.safe_load_all(text)
    return text.partition("apiVersion")[0], policy, made


def groups(made: Any) -> dict[str, tuple[int, int, str, Any]]:
    """Of each worker group: fewest and most pods, CPUs for Ray, GPUs."""
    found = {}
    for group in made["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        sizes = group["minReplicas"], group["maxReplicas"], group["rayStartParams"]["num-cpus"]
        found[group["groupName"]] = (*sizes, limits.get("nvidia.com/gpu"))
    return found


@pytest.mark.parametrize(
    "engines",
    [
        {"smol": {"kind": "llamacpp", "model": "smollm2-135m-instruct"}},
        {"small": GPU, "big": {**GPU, "tensor_parallel_size": 4, "resources": {"accelerator_type": "H100"}}},
        {"e": {"kind": "scripted", "model": "m", "resources": {"custom": {"tpu slice": 2.0}}}},
        {"e": {**GPU, "replicas": {"min": 0, "max": 4}}},
    ],
)
def test_the_file_holds_to_the_schema_of_the_operator(schema: Any, engines: Any) -> None:
    _, policy, made = service(spec(**engines), redis="redis:6379")
    jsonschema.validate(made, schema, jsonschema.Draft202012Validator)
    assert policy["kind"] == "NetworkPolicy" and made["metadata"]["name"] == "my-panel"


def test_the_schema_finds_a_key_that_the_operator_does_not_know(schema: Any) -> None:
    _, _, made = service(spec(s={"kind": "scripted", "model": "m"}))
    made["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["imagge"] = "i"
    with pytest.raises(jsonschema.ValidationError, match="imagge"):
        jsonschema.validate(made, schema, jsonschema.Draft202012Validator)


def test_every_kind_of_node_is_a_group_with_room_for_its_replicas() -> None:
    engines: dict[str, dict[str, Any]] = {
        "smol": {"kind": "llamacpp", "model": "smollm2-135m-instruct", "replicas": 3, "resources": {"num_cpus": 2}},
        "half": {**GPU, "replicas": 4, "resources": {"num_gpus": 0.5}},
        "tp": {**GPU, "tensor_parallel_size": 4, "replicas": {"min": 1, "max": 3}},
        "h100": {**GPU, "resources": {"accelerator_type": "H100"}},
        "remote": {"kind": "openai", "model": "m", "base_url": "https://llm.example/v1"},
    }
    written = spec(**engines)
    for engine in ("half", "tp", "h100"):
        written["engines"][engine]["resources"] = {"num_cpus": 1, **written["engines"][engine].get("resources", {})}
    _, _, made = service(written)
    # A pod of the group "gpu" has 4 GPUs and the one CPU that its largest unit takes, so each replica has its own.
    assert groups(made) == {"cpu": (3, 3, "2", None), "gpu": (5, 7, "1", 4), "h100": (1, 1, "1", 1)}
    h100 = made["spec"]["rayClusterConfig"]["workerGroupSpecs"][-1]
    assert h100["template"]["spec"]["nodeSelector"] == {"moa-ray/accelerator": "H100"}
    assert json.loads(json.loads(h100["rayStartParams"]["resources"])) == {"accelerator_type:H100": 1}


@given(st.lists(st.tuples(st.sampled_from([0.25, 0.5, 1, 2, 4]), st.sampled_from([0, 0.5, 1, 2])), min_size=1))
def test_pods_hold_all_units_and_are_not_more_than_units(drawn: list[tuple[float, float]]) -> None:
    units = [Unit(*each) for each in drawn]
    group = Group("g", most=units)
    pods, pod = group.pods(units), group.pod
    assert pods <= len(units)
    assert pods * pod.cpus >= sum(u.cpus for u in units) and pods * pod.gpus >= sum(u.gpus for u in units)


def test_secrets_are_named_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-here")
    engines = {"remote": {"kind": "openai", "model": "m", "base_url": "https://x.example/v1", "api_key": "${SOME_KEY}"}}
    written = spec(**engines)
    comment, _, made = service(written, redis="redis:6379")
    assert "SOME_KEY=… --from-literal=REDIS_PASSWORD=…" in comment and "sk-here" not in yaml.safe_dump(made)
    for group in made["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert [each["name"] for each in container["env"]] == ["MOA_RAY_API_KEYS", "SOME_KEY"]


def test_pods_may_do_nothing_that_they_need_not() -> None:
    _, policy, made = service(spec(s={"kind": "scripted", "model": "m"}))
    cluster = made["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    to_all = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert to_all == [{"ports": [{"port": 8000}]}]


def test_what_a_pod_cannot_have_is_told_with_its_line() -> None:
    text = """version: 1
name: g
engines:
  file: {kind: llamacpp, model: /models/mine.gguf}
  near: {kind: openai, model: m, base_url: "http://127.0.0.1:9000/v1"}
agents:
  a: {engine: file}
  b: {engine: near}
layers: [[a, b]]
aggregator: a
"""
    graph = loads(text, file="g.yaml")
    with pytest.raises(SpecError) as told:
        kuberay.manifests([graph], [yaml.safe_load(text)], "g", "", image="i")
    assert "g.yaml:4" in str(told.value) and "is a file of this machine" in str(told.value)
    assert "a pod finds nobody but itself" in str(told.value)


def test_the_file_in_deployments_is_what_deploy_prints_and_its_serve_config_is_one(schema: Any) -> None:
    done = moa_ray("deploy", "examples/quickstart.yaml", "--target", "kuberay", "--redis", "redis:6379")
    assert done.returncode == 0, done.stderr
    assert (KUBERAY / "base" / "rayservice.yaml").read_text() == done.stdout
    _, made = yaml.safe_load_all(done.stdout)
    jsonschema.validate(made, schema, jsonschema.Draft202012Validator)
    config = ServeDeploySchema.model_validate(yaml.safe_load(made["spec"]["serveConfigV2"]))
    assert config.http_options.host == "0.0.0.0" and config.applications[0].name == "quickstart"
    assert made["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__


def test_the_commands_of_the_docs_run(tmp_path: Path) -> None:
    (tmp_path / "panel.yaml").write_text(yaml.safe_dump(spec(s={"kind": "scripted", "model": "m"})))
    found = commands(ROOT / "docs" / "deploying.md")
    assert len(found) == 2
    for words in found:
        done = moa_ray(*words, cwd=tmp_path)
        assert done.returncode == 0 and "kind: RayService" in done.stdout


def test_a_graph_that_no_pod_can_hold_is_refused_by_the_command(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(yaml.safe_dump(spec(f={"kind": "llamacpp", "model": "./mine.gguf"})))
    done = moa_ray("deploy", str(path), "--target", "kuberay")
    assert done.returncode == 2 and done.stdout == "" and f"{path}:" in done.stderr


def test_the_container_file_is_of_the_version_of_ray_that_is_pinned_and_not_root() -> None:
    text = (ROOT / "deployments" / "Containerfile").read_text()
    assert f"rayproject/ray:{ray.__version__}-" in text and "USER ray" in text and "USER root" not in text


def test_the_overlay_is_the_same_service_elsewhere_and_its_ingress_leads_to_it(schema: Any) -> None:
    command = [tool("kubectl"), "kustomize", str(KUBERAY / "production")]
    built = {each["kind"]: each for each in yaml.safe_load_all(subprocess.check_output(command, timeout=60))}
    made = built["RayService"]
    jsonschema.validate(made, schema, jsonschema.Draft202012Validator)
    assert {each["metadata"]["namespace"] for each in built.values()} == {"panels"}
    groups = made["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pods = [group["template"]["spec"] for group in [*groups, made["spec"]["rayClusterConfig"]["headGroupSpec"]]]
    assert {pod["containers"][0]["image"] for pod in pods} == {"registry.example/moa-ray:0.1.0"}
    assert groups[0]["template"]["spec"]["nodeSelector"] == {"pool": "inference"}
    (path,) = built["Ingress"]["spec"]["rules"][0]["http"]["paths"]
    service = path["backend"]["service"]
    assert service == {"name": f"{made['metadata']['name']}-serve-svc", "port": {"number": kuberay.PORT}}


def test_pods_get_the_secrets_of_the_graph_and_a_system_prompt_may_hold_what_looks_like_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("THEIR_KEY", "sk-secret")
    remote = {"kind": "openai", "model": "m", "base_url": "https://models.example/v1", "api_key": "${THEIR_KEY}"}
    written = spec(one=remote)
    written["agents"]["a_one"]["system"] = "Write ${PRICE} where a price goes."
    head, _, made = service(written)
    (group,) = made["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    names = [each["name"] for each in group["template"]["spec"]["containers"][0]["env"]]
    assert names == ["MOA_RAY_API_KEYS", "THEIR_KEY"]
    assert "PRICE" not in head and "sk-secret" not in head + str(made)
