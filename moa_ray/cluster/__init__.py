"""The only room that knows Ray Serve.

Builds a graph's application (a router, one deployment per engine), joins or starts a cluster, deploys,
and offers the Python interface `MoA`. Touches `runtime`, `engines`, `graph`, `errors`.
"""

import os

# Ray forks to start its daemons. With gRPC's fork handlers, a second start in one process hangs every other time (3 of
# 6 starts; 0 of 20 without them). gRPC reads this when Ray is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from moa_ray.cluster.moa import MoA
from moa_ray.cluster.session import Session

__all__ = ["MoA", "Session"]
