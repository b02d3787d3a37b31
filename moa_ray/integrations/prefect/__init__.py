"""A graph as a flow of Prefect 3: each call a task run, each task run a call of a moa-ray server.

Prefect is imported when one of the names below is first used; `source` does without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moa_ray.integrations.needs import need
from moa_ray.integrations.prefect.export import source

if TYPE_CHECKING:
    from moa_ray.integrations.prefect.flows import moa_flow, publish, seen
    from moa_ray.integrations.prefect.tasks import MoAServer, ask

_HOMES = {"MoAServer": "tasks", "ask": "tasks", "moa_flow": "flows", "publish": "flows", "seen": "flows"}

__all__ = ["MoAServer", "ask", "moa_flow", "publish", "seen", "source"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    need("prefect", "prefect", "3.9", "prefect")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
