"""Engine kinds by name: the built-in ones, and those of installed packages.

A package brings its own by the entry point group `moa_ray.engines`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ValidationError

from moa_ray.engines.protocol import Engine
from moa_ray.errors import SpecError
from moa_ray.graph import EngineSpec, Graph, Resources
from moa_ray.graph.plugins import Plugins


class EngineKind(Protocol):
    """What a plug-in registers: a class that makes engines.

    Attributes:
        Options: Pydantic model of the kind's own YAML keys; extra keys forbidden.
    """

    Options: ClassVar[type[BaseModel]]

    def default_resources(self, options: BaseModel) -> Resources:
        """What a replica takes where the YAML says nothing (a classmethod)."""
        ...

    async def create(self, model: str, options: BaseModel, *, num_cpus: float) -> Engine:
        """A ready engine (a classmethod): the model is loaded when this returns."""
        ...


@runtime_checkable
class KindWithWorkers(Protocol):
    """A kind whose replica is a set of processes, such as those of tensor parallelism."""

    def workers(self, options: BaseModel) -> int:
        """How many (a classmethod)."""
        ...


KINDS: Plugins[EngineKind] = Plugins(
    "moa_ray.engines",
    "engine kind",
    {
        "scripted": "moa_ray.engines.scripted:Scripted",
        "llamacpp": "moa_ray.engines.llamacpp:LlamaCpp",
        "moe": "moa_ray.engines.moe:MoEEngine",
        "openai": "moa_ray.engines.openai_api:OpenAIEngine",
        "vllm": "moa_ray.engines.vllm:VLLM",
    },
)


def kind_of(spec: EngineSpec) -> EngineKind:
    """The class behind `spec.kind`.

    Raises:
        SpecError: If no such kind is known, or its plug-in cannot be loaded.
    """
    return KINDS.find(spec.kind)


def options_of(spec: EngineSpec) -> BaseModel:
    """The kind's own options of `spec`, checked.

    Raises:
        pydantic.ValidationError: If they do not fit.
    """
    return kind_of(spec).Options.model_validate(spec.options)


def resources_of(spec: EngineSpec) -> Resources:
    """What each replica of `spec` takes, the kind's defaults filled in."""
    default = kind_of(spec).default_resources(options_of(spec))
    missing = {
        k: v for k, v in default.model_dump(exclude_none=True).items() if k not in spec.resources.model_fields_set
    }
    return spec.resources.model_copy(update=missing)


def workers_of(spec: EngineSpec) -> int:
    """Processes that share the resources of each replica of `spec` evenly, on one node or several.

    0 where the replica itself takes them. A kind has them if it has a classmethod `workers(options) -> int`.
    """
    kind = kind_of(spec)
    return kind.workers(options_of(spec)) if isinstance(kind, KindWithWorkers) else 0


def check(graph: Graph) -> None:
    """Check kind and options of every engine of `graph`.

    Raises:
        SpecError: With file, line and key of what is wrong.
    """
    for name, spec in graph.engines.items():
        path = graph.path_of_engine(name)
        try:
            options_of(spec)
        except SpecError as error:
            raise graph.source.error((*path, "kind"), error.message, hint=error.hint) from None
        except ValidationError as error:
            raise graph.source.invalid(path, error, kind_of(spec).Options) from None


async def create(spec: EngineSpec) -> Engine:
    """Make the engine that `spec` describes, in this process."""
    num_cpus = resources_of(spec).num_cpus or 1.0
    return await kind_of(spec).create(spec.model, options_of(spec), num_cpus=num_cpus)
