"""Graphs as a `RayService` of KubeRay: one file for `kubectl apply`, made of the same graphs as every deployment.

A worker group for each kind of node that the engines ask for: one for CPUs alone, one for GPUs of any type, one for
each accelerator type and each set of custom resources. Written for KubeRay 1.7 (`ray.io/v1`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from urllib.parse import urlsplit

import yaml

from moa_ray.engines import catalogue, registry
from moa_ray.graph import Graph
from moa_ray.graph.loader import secrets_of
from moa_ray.graph.source import Problem
from moa_ray.server.settings import KEYS

ACCELERATOR_LABEL = "moa-ray/accelerator"
PORT = 8000
RAY = "2.60.0"
"""The version in the image."""
_GIB_PER_CPU, _GIB_PER_GPU, _HEAD_GIB = 4, 32, 8
_SHARED_MEMORY = "2Gi"
_SPARE_CPUS = 1
"""In each pod, for Ray itself and for gateways and routers, which reserve none."""
_GPUS_OF_A_NODE = 8
_IDLE_S = 300
_LOCAL = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, slots=True)
class Unit:
    """What has to be on one node: a replica, or a worker of one that has more GPUs than a node.

    Args:
        cpus: Logical CPUs.
        gpus: GPUs; a fraction shares one.
    """

    cpus: float
    gpus: float


@dataclass(slots=True)
class Group:
    """Pods of one kind.

    Args:
        name: Of the worker group.
        accelerator: Ray's name of the accelerator type, "" for any or none.
        custom: Custom resources that a pod has, the most that a unit asks for.
        least: Units of the fewest replicas.
        most: Units of the most replicas.
    """

    name: str
    accelerator: str = ""
    custom: dict[str, float] = field(default_factory=dict)
    least: list[Unit] = field(default_factory=list)
    most: list[Unit] = field(default_factory=list)

    @property
    def pod(self) -> Unit:
        """What a pod has: room for the largest unit, in whole CPUs and GPUs."""
        return Unit(max(1, ceil(max(u.cpus for u in self.most))), ceil(max(u.gpus for u in self.most)))

    def pods(self, units: Sequence[Unit]) -> int:
        """Pods that `units` need, the largest first, each in the first pod that has room."""
        rooms: list[Unit] = []
        for unit in sorted(units, key=lambda u: (u.gpus, u.cpus), reverse=True):
            for index, room in enumerate(rooms):
                if room.cpus >= unit.cpus and room.gpus >= unit.gpus:
                    rooms[index] = Unit(room.cpus - unit.cpus, room.gpus - unit.gpus)
                    break
            else:
                rooms.append(Unit(self.pod.cpus - unit.cpus, self.pod.gpus - unit.gpus))
        return len(rooms)


def manifests(
    graphs: Sequence[Graph],
    written: Sequence[Mapping[str, Any]],
    app: str,
    serve_config: str,
    *,
    image: str,
    redis: str = "",
) -> str:
    """The file: a comment with the secrets that it needs, a `NetworkPolicy`, a `RayService`.

    Args:
        graphs: The graphs.
        written: The same as the user wrote them, secrets still by name.
        app: Name of the application, and of the service.
        serve_config: The file for `serve deploy`, for `serveConfigV2`.
        image: Container image with moa-ray and what the engines need.
        redis: `host:port` of the Redis that keeps the head's state, so that a head that restarts loses nothing.

    Raises:
        SpecError: If an engine needs what a pod has not, with file:line.
    """
    for graph in graphs:
        if problems := list(_problems(graph)):
            raise graph.source.errors(problems)
    name = re.sub(r"[^a-z0-9-]+", "-", app.lower()).strip("-")
    secrets = sorted({secret for spec in written for secret in secrets_of(spec)})
    groups = groups_of(graphs)
    pods = _Pods(name, image, [KEYS, *secrets], max(g.spec.policy.deadline_s for g in graphs))
    documents = [_network_policy(name), _service(pods, groups, serve_config, redis)]
    head = [
        "# Made by moa-ray deploy --target kuberay; for KubeRay 1.7 or newer. It needs a secret with:",
        f"#   kubectl create secret generic {name}-keys "
        + " ".join(f"--from-literal={key}=…" for key in [KEYS, *secrets, *(["REDIS_PASSWORD"] if redis else [])]),
        *(
            f"# and nodes with {group.accelerator}: kubectl label node NODE {ACCELERATOR_LABEL}={group.accelerator}"
            for group in groups
            if group.accelerator
        ),
    ]
    texts = [yaml.dump(d, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110) for d in documents]
    return "\n".join(head) + "\n" + "---\n".join(texts)


def groups_of(graphs: Sequence[Graph]) -> list[Group]:
    """The worker groups that the engines of `graphs` ask for."""
    groups: dict[tuple[Any, ...], Group] = {}
    for graph in graphs:
        for spec in graph.engines.values():
            wanted = registry.resources_of(spec)
            cpus, gpus = wanted.num_cpus or 0, wanted.num_gpus or 0
            workers = (registry.workers_of(spec) or 1) if gpus > _GPUS_OF_A_NODE else 1
            accelerator = wanted.accelerator_type or ""
            key = (bool(gpus or accelerator), accelerator, tuple(sorted(wanted.custom)))
            words = [accelerator.lower() or ("gpu" if gpus else "cpu"), *sorted(wanted.custom)]
            group = groups.setdefault(key, Group(re.sub(r"[^a-z0-9-]+", "-", "-".join(words).lower()), accelerator))
            for resource, amount in wanted.custom.items():
                group.custom[resource] = max(amount, group.custom.get(resource, 0))
            unit = Unit(cpus / workers, gpus / workers)
            group.least += [unit] * workers * spec.least_replicas
            group.most += [unit] * workers * spec.most_replicas
    return list(groups.values())


def _problems(graph: Graph) -> Iterator[Problem]:
    """What a pod cannot have."""
    for name, spec in graph.engines.items():
        path = graph.path_of_engine(name)
        if catalogue.is_path(spec.model):
            hint = "name a model of the catalogue or a Hugging Face id, which each pod fetches"
            yield Problem((*path, "model"), f"{spec.model} is a file of this machine, and not of a pod", hint)
        url = str(spec.options.get("base_url") or "")
        if urlsplit(url).hostname in _LOCAL:
            yield Problem((*path, "base_url"), f"at {url} a pod finds nobody but itself", "name a service")


# ---------------------------------------------------------------- the documents


@dataclass(frozen=True, slots=True)
class _Pods:
    """What all pods have in common."""

    name: str
    image: str
    secrets: Sequence[str]
    deadline_s: float

    @property
    def labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": "moa-ray", "app.kubernetes.io/instance": self.name}

    def template(
        self, container: str, cpus: int, gpus: int, gib: int, *, ports: Mapping[str, int], accelerator: str = ""
    ) -> dict[str, Any]:
        """A pod of one container, that may do nothing which Ray does not need."""
        amounts: dict[str, Any] = {"cpu": str(cpus), "memory": f"{gib}Gi"}
        if gpus:
            amounts["nvidia.com/gpu"] = gpus
        spec: dict[str, Any] = {
            "terminationGracePeriodSeconds": ceil(self.deadline_s) + 30,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "fsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": container,
                    "image": self.image,
                    "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
                    "env": [
                        {"name": key, "valueFrom": {"secretKeyRef": {"name": f"{self.name}-keys", "key": key}}}
                        for key in self.secrets
                    ],
                    "resources": {"requests": amounts, "limits": amounts},
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", "ray stop"]}}},
                    "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
                }
            ],
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}}],
        }
        if accelerator:
            spec["nodeSelector"] = {ACCELERATOR_LABEL: accelerator}
        if gpus:
            spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        return {"metadata": {"labels": self.labels}, "spec": spec}


def _service(pods: _Pods, groups: Sequence[Group], serve_config: str, redis: str) -> dict[str, Any]:
    scales = any(group.pods(group.least) < group.pods(group.most) for group in groups)
    head = pods.template(
        "ray-head",
        2,
        0,
        _HEAD_GIB,
        ports={"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "serve": PORT},
    )
    if scales:  # the autoscaler beside the head asks Kubernetes for pods
        head["spec"]["automountServiceAccountToken"] = True
    cluster: dict[str, Any] = {
        "rayVersion": RAY,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": scales,
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": head},
        "workerGroupSpecs": [_worker_group(pods, group) for group in groups],
    }
    if scales:
        cluster["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": _IDLE_S}
    if redis:
        password = {"secretKeyRef": {"name": f"{pods.name}-keys", "key": "REDIS_PASSWORD"}}
        cluster["gcsFaultToleranceOptions"] = {"redisAddress": redis, "redisPassword": {"valueFrom": password}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": pods.name, "labels": pods.labels},
        "spec": {
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": ceil(pods.deadline_s) + 60,
            "serveConfigV2": _Block(serve_config),
            "rayClusterConfig": cluster,
        },
    }


def _worker_group(pods: _Pods, group: Group) -> dict[str, Any]:
    pod = group.pod
    params = {"num-cpus": str(int(pod.cpus))}
    resources = dict(group.custom)
    if group.accelerator:
        resources[f"accelerator_type:{group.accelerator}"] = 1
    if resources:
        params["resources"] = json.dumps(json.dumps(resources))  # KubeRay hands it to a shell
    least, most = group.pods(group.least), group.pods(group.most)
    gib = _GIB_PER_CPU * int(pod.cpus) + _GIB_PER_GPU * int(pod.gpus)
    return {
        "groupName": group.name,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": params,
        "template": pods.template(
            "ray-worker",
            int(pod.cpus) + _SPARE_CPUS,
            int(pod.gpus),
            gib,
            ports={"serve": PORT, "metrics": 8080},
            accelerator=group.accelerator,
        ),
    }


def _network_policy(name: str) -> dict[str, Any]:
    """Everybody may ask at the port of Serve; Ray's own ports are for the cluster's pods and the operator."""
    mine = {"app.kubernetes.io/name": "moa-ray", "app.kubernetes.io/instance": name}
    operator = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}, "namespaceSelector": {}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": mine},
        "spec": {
            "podSelector": {"matchLabels": mine},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"ports": [{"port": PORT}]},
                {"from": [{"podSelector": {"matchLabels": mine}}]},
                {"from": [operator], "ports": [{"port": 8265}, {"port": PORT}]},
            ],
        },
    }


class _Block(str):
    """Text that is written in lines."""


class _Dumper(yaml.SafeDumper):
    """Without anchors, which nobody wants to edit."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    _Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|")
)
