"""What a name in a spec stands for: something built in, or what an installed package brings by an entry point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from moa_ray.errors import SpecError
from moa_ray.graph.source import which

GROUPS = ("moa_ray.engines", "moa_ray.gates", "moa_ray.aggregators", "moa_ray.scorers", "moa_ray.agreement")
"""The entry point groups, one for each sort of plug-in."""

T = TypeVar("T")


class Plugins(Generic[T]):
    """Everything of one sort, by name. A package's goes before a built-in one of the same name.

    Args:
        group: The entry point group.
        sort: What one is called in messages, such as `engine kind`.
        built_in: The built-in ones, or `module:attribute` of those that are imported when they are asked for.
    """

    def __init__(self, group: str, sort: str, built_in: Mapping[str, T | str]) -> None:
        self.group = group
        self._sort = sort
        self._built_in = built_in
        self._found: dict[str, T] = {}

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted({*self._built_in, *(point.name for point in entry_points(group=self.group))}))

    def find(self, name: str) -> T:
        """What is called `name`.

        Raises:
            SpecError: If there is none, or its plug-in cannot be loaded.
            ImportError: If a built-in one needs what is not installed.
        """
        if name not in self._found:
            self._found[name] = self._load(name)
        return self._found[name]

    def _load(self, name: str) -> T:
        for point in entry_points(group=self.group, name=name):
            try:
                return cast(T, point.load())
            except Exception as error:  # a plug-in may raise anything
                message = f"the {self._sort} {name!r} ({point.value}) cannot be loaded: {_reason(error)}"
                raise SpecError(message) from error
        if name not in self._built_in:
            hint = which(name, self.names())
            raise SpecError(f"there is no {self._sort} {name!r}", hint=hint)
        found = self._built_in[name]
        if not isinstance(found, str):
            return found
        module, _, attribute = found.partition(":")
        return cast(T, getattr(import_module(module), attribute))


@dataclass(frozen=True, slots=True)
class Installed:
    """A plug-in that a package brings.

    Args:
        group: Its entry point group.
        name: What it is called in a spec.
        value: What stands for it, `module:attribute`.
        package: Who brings it.
        version: The package's version.
        error: Why it cannot be loaded, "" where it can.
    """

    group: str
    name: str
    value: str
    package: str
    version: str
    error: str


def installed() -> tuple[Installed, ...]:
    """Every plug-in of every installed package, each loaded once to see whether that works."""
    return tuple(_tried(point) for group in GROUPS for point in sorted(entry_points(group=group), key=_by_name))


def _by_name(point: EntryPoint) -> str:
    return point.name


def _tried(point: EntryPoint) -> Installed:
    error = ""
    try:
        point.load()
    except Exception as why:  # a plug-in may raise anything
        error = _reason(why)
    brought = (point.dist.name, point.dist.version) if point.dist else ("", "")
    return Installed(point.group, point.name, point.value, *brought, error)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
