"""Whether it is worth it: a panel beside its agents, and an endpoint under load.

Knows engines through their protocol, and neither Ray nor torch; `served` alone asks the cluster for actors.
"""

from moa_ray.evaluate.figures import Figures, Objectives
from moa_ray.evaluate.load import Sample, arrivals, closed_loop, open_loop

__all__ = ["Figures", "Objectives", "Sample", "arrivals", "closed_loop", "open_loop"]
