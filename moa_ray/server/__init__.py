"""The HTTP edge: a graph as an OpenAI model.

An ASGI application over a `Backend`; it knows no Ray (only `deployed`, which puts it into the cluster, does), and
every answer it gives is made of a run's events.
"""

from moa_ray.server.app import create_app
from moa_ray.server.backend import Backend
from moa_ray.server.settings import ServerSettings

__all__ = ["Backend", "ServerSettings", "create_app"]
