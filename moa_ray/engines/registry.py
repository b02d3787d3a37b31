"""Engine kinds by name: the built-in ones, and those of installed packages.

A package brings its own by the entry point group `moa_ray.engines`.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar, Protocol, cast, runtime_checkable

from pydantic import BaseModel, ValidationError

from moa_ray.engines.protocol import Engine
from moa_ray.errors import SpecError
from moa_ray.graph import EngineSpec, Graph, Resources

GROUP = "moa_ray.engines"
_BUILT_IN = {
    "scripted": "moa_ray.engines.scripted:Scripted",
    "llamacpp": "moa_ray.engines.llamacpp:LlamaCpp",
    "moe": "moa_ray.engines.moe:MoEEngine",
    "openai": "moa_ray.engines.openai_api:OpenAIEngine",
    "vllm": "moa_ray.engines.vllm:VLLM",
}


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


@cache
def kinds() -> tuple[str, ...]:
    """Names of all engine kinds, sorted."""
    return tuple(sorted({*_BUILT_IN, *(point.name for point in entry_points(group=GROUP))}))


def kind_of(spec: EngineSpec) -> EngineKind:
    """The class behind `spec.kind`.

    Raises:
        SpecError: If no such kind is known, or its plug-in cannot be imported.
    """
    return _load(spec.kind)


@cache
def _load(name: str) -> EngineKind:
    for point in entry_points(group=GROUP, name=name):
        return _from_plugin(point)
    if name not in _BUILT_IN:
        near = difflib.get_close_matches(name, kinds(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known kinds: {', '.join(kinds())}"
        raise SpecError(f"there is no engine kind {name!r}", hint=hint)
    module, _, attribute = _BUILT_IN[name].partition(":")
    return cast(EngineKind, getattr(import_module(module), attribute))


def _from_plugin(point: EntryPoint) -> EngineKind:
    try:
        return cast(EngineKind, point.load())
    except (ImportError, AttributeError) as error:
        raise SpecError(f"the engine plug-in {point.name!r} ({point.value}) cannot be loaded: {error}") from error


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
