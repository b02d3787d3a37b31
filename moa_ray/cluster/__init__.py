"""The only room that knows Ray Serve.

Builds a graph's application (a router, one deployment per engine), joins or starts a cluster, deploys,
and offers the Python interface `MoA`. Touches `runtime`, `engines`, `graph`, `errors`.
"""

from moa_ray.cluster.moa import MoA
from moa_ray.cluster.session import Session

__all__ = ["MoA", "Session"]
