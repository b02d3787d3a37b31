"""One model out of many, on Ray.

`import moa_ray` is instant: the names below load what they need when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moa_ray.cluster import MoA
    from moa_ray.graph import Graph, from_dict, load, loads
    from moa_ray.runtime import RunResult

__version__ = "0.1.0"

_HOMES = {
    "Graph": "moa_ray.graph",
    "MoA": "moa_ray.cluster",
    "RunResult": "moa_ray.runtime",
    "from_dict": "moa_ray.graph",
    "load": "moa_ray.graph",
    "loads": "moa_ray.graph",
}

__all__ = ["Graph", "MoA", "RunResult", "from_dict", "load", "loads"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moa_ray' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
