"""A graph as a flow of Prefect 3: each call a task run, each task run a call of a moa-ray server.

Prefect is imported when one of the names below is first used; `source` does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moa_ray.integrations.needs import lazily
from moa_ray.integrations.prefect.export import source

if TYPE_CHECKING:
    from moa_ray.integrations.prefect.flows import moa_flow, publish, seen
    from moa_ray.integrations.prefect.tasks import MoAServer, ask

_HOMES = {"MoAServer": "tasks", "ask": "tasks", "moa_flow": "flows", "publish": "flows", "seen": "flows"}

__all__ = ["MoAServer", "ask", "moa_flow", "publish", "seen", "source"]

__getattr__ = lazily(__name__, _HOMES, "prefect", "prefect", "3.9", "prefect")
