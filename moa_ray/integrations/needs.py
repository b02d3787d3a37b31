"""The engines of the plug-ins, imported when they are used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

from moa_ray.errors import MoARayError


def need(module: str, package: str, at_least: str, extra: str) -> ModuleType:
    """Import an engine.

    Args:
        module: What is imported.
        package: What installs it.
        at_least: Oldest version that will do.
        extra: Our extra that brings it.

    Raises:
        MoARayError: If it is missing or too old.
    """
    hint = f"pip install 'moa-ray[{extra}]'"
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MoARayError(f"{package} {at_least} or newer is needed, and is not installed", hint=hint) from None
    if _numbers(version(package)) < _numbers(at_least):
        raise MoARayError(f"{package} {at_least} or newer is needed, and {version(package)} is installed", hint=hint)
    return found


def lazily(package: str, homes: Mapping[str, str], *engine: str) -> Callable[[str], Any]:
    """A package's `__getattr__`: its names are there once their module, which imports the engine, is asked for.

    Args:
        package: The package's `__name__`.
        homes: The module of each name.
        engine: What `need` takes.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        need(*engine)
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find


def _numbers(text: str) -> list[int]:
    """The release in a version: 3.10 is newer than 3.9.1."""
    release = re.match(r"[\d.]+", text)
    return [int(number) for number in release[0].split(".") if number] if release else []
