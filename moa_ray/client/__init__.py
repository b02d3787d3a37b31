"""Calling a served graph from Python: a synchronous and an asynchronous client. Needs neither Ray nor torch.

Touches `errors` alone; speaks the HTTP of `server` through `httpx2`.
"""

from moa_ray.client.answer import AgentCall, Answer, Delta, Draft, Event, Finished, Usage
from moa_ray.client.asynchronous import AsyncClient
from moa_ray.client.synchronous import Client
from moa_ray.client.wire import Asked

__all__ = ["AgentCall", "Answer", "Asked", "AsyncClient", "Client", "Delta", "Draft", "Event", "Finished", "Usage"]
