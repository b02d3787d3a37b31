"""Which replica of an engine gets a call: one of those that the request does not avoid, and the less busy of two."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from moa_ray.engines.protocol import EngineRequest


class ReplicaRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Serve's power of two choices, for requests that may name replicas to avoid.

    Without Serve's first-in-first-out rule, by which a replica chosen for one call may go to another.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Two candidates, of which Serve takes the less busy one."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
        avoid = _request(pending_request).avoid
        wanted = [replica for replica in candidate_replicas if replica.replica_id.unique_id not in avoid]
        pool = wanted or candidate_replicas
        return [random.sample(pool, min(2, len(pool)))]


_ANY = EngineRequest("", ())


def _request(pending: PendingRequest | None) -> EngineRequest:
    """What is asked of the engine; some calls, such as `info`, hold no request."""
    args: Any = pending.args if pending is not None else ()
    return next((arg for arg in args if isinstance(arg, EngineRequest)), _ANY)
