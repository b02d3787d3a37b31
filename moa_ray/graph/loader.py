"""Reading a spec: YAML with the line of every key, secrets from the environment, then the checks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from typing import Any

import yaml
from pydantic import SecretStr, ValidationError

from moa_ray.errors import SpecError
from moa_ray.graph.dag import Graph, build
from moa_ray.graph.source import Path, Problem, Source, problems_of
from moa_ray.graph.spec import GraphSpec

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET_KEYS = frozenset({"api_key", "headers"})
_MOST_NODES = 100_000
"""Of YAML, aliases expanded: more is a mistake or an attack."""


def load(path: str | PathLike[str]) -> Graph:
    """The graph that the file at `path` describes.

    Raises:
        SpecError: With file, line and key of everything that is wrong.
    """
    file = fspath(path)
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
    except FileNotFoundError:
        raise SpecError("there is no such file", file=file) from None
    except UnicodeDecodeError:
        raise SpecError("the file is not UTF-8 text", file=file) from None
    except OSError as error:
        raise SpecError(f"the file cannot be read: {error.strerror}", file=file) from None
    return loads(text, file=file)


def loads(text: str, *, file: str = "<string>") -> Graph:
    """The graph that `text` describes; `file` is its name in errors. Raises as `load` does."""
    data, source = _parse(text, file)
    return _checked(data, source)


def from_dict(data: Mapping[str, Any]) -> Graph:
    """The graph that `data` describes, in the shape of the YAML. Raises as `load` does."""
    return _checked(data, Source())


def _checked(data: Any, source: Source) -> Graph:
    if not isinstance(data, Mapping):
        raise source.error((), "a spec is a mapping of keys such as name, agents, layers")
    problems: list[Problem] = []
    data = _with_secrets(data, (), problems)
    try:
        spec = GraphSpec.model_validate(data)
    except ValidationError as error:
        problems += problems_of(error, GraphSpec)
    if problems:
        raise source.errors(problems)
    return build(spec, source)


# ---------------------------------------------------------------- secrets


def secrets_of(data: Mapping[str, Any]) -> set[str]:
    """Names of the environment variables that `data`, in the shape of the YAML, takes secrets from."""
    return {name for path, text in _texts(data, ()) if _is_secret(path) for name in _VARIABLE.findall(text)}


def _texts(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    match value:
        case Mapping():
            for key, item in value.items():
                yield from _texts(item, (*path, key))
        case list():
            for index, item in enumerate(value):
                yield from _texts(item, (*path, index))
        case str():
            yield path, value


def _with_secrets(value: Any, path: Path, problems: list[Problem]) -> Any:
    """`value` with `${NAME}` filled in where secrets stand, and every secret masked."""
    match value:
        case Mapping():
            return {key: _with_secrets(item, (*path, key), problems) for key, item in value.items()}
        case list():
            return [_with_secrets(item, (*path, index), problems) for index, item in enumerate(value)]
        case str() if _is_secret(path):
            return SecretStr(_VARIABLE.sub(lambda found: _variable(found[1], path, problems), value))
        case str() if _VARIABLE.search(value) and "system" not in path:
            problems.append(Problem(path, "${…} is for secrets only: an engine's api_key and headers"))
    return value


def _is_secret(path: Path) -> bool:
    of_engine = path[:1] == ("engines",) or (path[:1] == ("agents",) and path[2:3] == ("engine",))
    return of_engine and not _SECRET_KEYS.isdisjoint(path[2:])


def _variable(name: str, path: Path, problems: list[Problem]) -> str:
    if name not in os.environ:
        problems.append(Problem(path, f"the environment variable {name} is not set", f"export {name}=…"))
    return os.environ.get(name, "")


# ---------------------------------------------------------------- YAML


def _parse(text: str, file: str) -> tuple[Any, Source]:
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                raise SpecError("the file is empty", file=file, line=1)
            lines: dict[Path, int] = {(): root.start_mark.line + 1}
            _Lines(file, lines).walk(root, ())
            return loader.construct_document(root), Source(file, lines, os.path.dirname(os.path.abspath(file)))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = " ".join(filter(None, (error.problem, error.context)))
        raise SpecError(f"this is no YAML: {words}", file=file, line=mark.line + 1 if mark else 0) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates and numbers that YAML's own rules break on
        raise SpecError(f"this is no YAML: {str(error).splitlines()[0]}", file=file) from None


class _Lines:
    """Notes the line of every key, and finds the keys that stand twice."""

    def __init__(self, file: str, lines: dict[Path, int]) -> None:
        self._file = file
        self._lines = lines
        self._open: list[yaml.Node] = []

    def walk(self, node: yaml.Node, path: Path) -> None:
        if any(node is outer for outer in self._open):
            raise SpecError("an alias contains itself", file=self._file, line=node.start_mark.line + 1)
        if len(self._lines) > _MOST_NODES:
            raise SpecError(f"more than {_MOST_NODES} keys, aliases expanded", file=self._file)
        self._open.append(node)
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._lines[*path, index] = item.start_mark.line + 1
                self.walk(item, (*path, index))
        self._open.pop()

    def _mapping(self, node: yaml.MappingNode, path: Path) -> None:
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    self.walk(merged, path)
                continue
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                place = Source(self._file, {(*path, name): line})
                raise place.error((*path, name), f"the key stands twice, first in line {self._lines[*path, name]}")
            seen.add(name)
            self._lines[*path, name] = line
            self.walk(value, (*path, name))
