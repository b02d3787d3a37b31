"""Graphs in the workflow engines that people already run.

Each module is a thin plug-in of one engine, needs the extra of its name, and imports its engine when it is used. All
stand on `steps` (a graph as what the engine schedules) and on the client: a server makes every call.
"""

from moa_ray.integrations.steps import Step, step_by_step

__all__ = ["Step", "step_by_step"]
