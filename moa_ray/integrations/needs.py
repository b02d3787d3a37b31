"""The engines of the plug-ins, imported when they are used."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

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


def _numbers(text: str) -> list[int]:
    """The release in a version: 3.10 is newer than 3.9.1."""
    release = re.match(r"[\d.]+", text)
    return [int(number) for number in release[0].split(".") if number] if release else []
