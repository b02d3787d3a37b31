"""Gate kinds by name: the built-in ones, and those of installed packages.

A package brings its own by the entry point group `moa_ray.gates`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from pydantic import BaseModel, ValidationError

from moa_ray.errors import SpecError
from moa_ray.gates.protocol import Gate
from moa_ray.graph import Graph
from moa_ray.graph.plugins import Plugins


class GateKind(Protocol):
    """What a plug-in registers: a class that makes gates.

    Attributes:
        Options: Pydantic model of the kind's own YAML keys; extra keys forbidden.
        timeout_s: How long it may take by default, in seconds.
        has_model: Whether it computes so much that it is to have an actor of its own; it can then ask no agents.
    """

    Options: ClassVar[type[BaseModel]]
    timeout_s: ClassVar[float]
    has_model: ClassVar[bool]

    def check(self, graph: Graph, options: BaseModel) -> None:
        """Whether the options fit the graph (a classmethod).

        Raises:
            SpecError: If they do not, such as for an agent that is not there.
        """
        ...

    def create(self, graph: Graph, options: BaseModel) -> Gate:
        """A ready gate (a classmethod).

        Raises:
            SpecError: If something that it needs is not installed. A file that may be written anew while the gate runs
                is no reason: until it is good, `choose` raises.
            ModelNotFound: If there is no model that it needs.
        """
        ...


KINDS: Plugins[GateKind] = Plugins(
    "moa_ray.gates",
    "gate kind",
    {
        "all": "moa_ray.gates.simple:All",
        "random": "moa_ray.gates.simple:Random",
        "rules": "moa_ray.gates.rules:Rules",
        "llm": "moa_ray.gates.asking:Llm",
        "cascade": "moa_ray.gates.asking:Cascade",
        "noisy_top_k": "moa_ray.gates.learned.kinds:NoisyTopK",
        "knn": "moa_ray.gates.learned.kinds:Knn",
        "solo": "moa_ray.gates.learned.kinds:Solo",
    },
)


def kind_of(name: str) -> GateKind:
    """The class behind a kind's name.

    Raises:
        SpecError: If no such kind is known, or it cannot be loaded.
    """
    try:
        return KINDS.find(name)
    except ImportError as error:
        hint = "pip install 'moa-ray[gate]'"
        raise SpecError(f"the gate kind {name!r} cannot be loaded: {error}", hint=hint) from error


def check(graph: Graph) -> None:
    """Check kind and options of the gate of `graph`.

    Raises:
        SpecError: With file, line and key of what is wrong.
    """
    spec = graph.spec.gate
    try:
        kind = kind_of(spec.kind)
    except SpecError as error:
        raise graph.source.error(("gate", "kind"), error.message, hint=error.hint) from None
    if spec.explore and spec.kind == "all":
        raise graph.source.error(("gate", "explore"), "a gate that asks everybody has nothing to explore")
    try:
        kind.check(graph, kind.Options.model_validate(spec.options))
    except ValidationError as error:
        raise graph.source.invalid(("gate",), error, kind.Options) from None
    except SpecError as error:
        raise graph.source.error(("gate",), error.message, hint=error.hint) from None


def create(graph: Graph) -> Gate:
    """The gate of `graph`, which was checked, in this process.

    Raises:
        SpecError: If something that it needs is not installed.
        ModelNotFound: If there is no model that it needs.
    """
    kind = kind_of(graph.spec.gate.kind)
    return kind.create(graph, kind.Options.model_validate(graph.spec.gate.options))


def has_model(graph: Graph) -> bool:
    """Whether the gate of `graph` is to have an actor of its own."""
    return kind_of(graph.spec.gate.kind).has_model


def timeout_s(graph: Graph) -> float:
    """How long a request waits for the gate of `graph`, in seconds."""
    return graph.spec.gate.timeout_s or kind_of(graph.spec.gate.kind).timeout_s


def for_runner(graph: Graph, gate: Gate | None = None) -> tuple[Gate, float] | None:
    """The gate of `graph` for a runner, and the seconds that it may take; None where everybody is asked.

    Args:
        graph: The graph, which was checked.
        gate: One that runs elsewhere; not given: one in this process. Raises as `create` does.
    """
    if graph.spec.gate.kind == "all":
        return None
    return gate if gate is not None else create(graph), timeout_s(graph)
