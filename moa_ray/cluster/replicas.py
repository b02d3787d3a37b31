"""Which replica of an engine gets a call: by what the call says it shares with others, and whom it avoids."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from statistics import fmean
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from moa_ray.engines.protocol import EngineRequest

_SLACK_CALLS, _SLACK_SHARE = 2, 0.25
"""By so many calls, or by this share of the mean where that is more, a replica may be busier than the least busy one
and still get a call for the sake of its cache. An engine may do no more than a few calls at once."""


class ReplicaRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Serve's choice of a replica, for calls that are an `EngineRequest`.

    Calls with the same `affinity` go to the same replica (rendezvous hashing, Thaler and Ravishankar 1998, so that a
    replica more or less moves few of them), unless it has much more to do than others (as in consistent hashing with
    bounded loads, Mirrokni et al. 2016). Calls without one go to the less busy of two (Mitzenmacher 2001). Neither
    goes to a replica that the call avoids while there are others.

    What a replica has to do is counted here, call by call, as in "least outstanding requests". Serve's own count
    takes over what a replica says when it accepts a call; where that comes late, calls that are over stay in it, and
    the replica stands idle for as long as Serve believes it (10 s).
    """

    # A replica that is asked how busy it is has so long to say so, before the call goes to the next one, whose cache
    # is cold. Serve's 0.1 s are missed on a machine with all cores busy.
    queue_len_response_deadline_s = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ongoing: Counter[str] = Counter()

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Count a call that is sent."""
        super().on_send_request(replica_id)
        self._ongoing[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count a call that is over, whichever way."""
        super().on_request_completed(replica_id, internal_request_id)
        self._ongoing[replica_id.unique_id] -= 1
        if self._ongoing[replica_id.unique_id] <= 0:
            del self._ongoing[replica_id.unique_id]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which they are to be tried."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
        request = _request(pending_request)
        wanted = [each for each in candidate_replicas if each.replica_id.unique_id not in request.avoid]
        pool = wanted or candidate_replicas
        if not request.affinity:
            pool = random.sample(pool, min(2, len(pool)))
        by_id = {each.replica_id.unique_id: each for each in pool}
        ongoing = {name: self._ongoing[name] for name in by_id}
        names = ranked(request.affinity, ongoing) if request.affinity else sorted(ongoing, key=ongoing.__getitem__)
        return [[by_id[name]] for name in names]

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Give `replica` to the call that it was chosen for.

        Serve 2.60 finds that by an id which all calls share that a deployment makes for one request; of two at once it
        would find one alone, and the other would wait.
        """
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                self._record_queue_wait_time(pending)
                pending.future.set_result(replica)
                self._remove_pending_request_from_indices(pending)
                return


def ranked(key: str, ongoing: dict[str, int]) -> Sequence[str]:
    """Names of replicas, the best for `key` first; those that have much more to do than others come last.

    Args:
        key: What calls have in common that are best answered by one replica.
        ongoing: Calls of each replica.
    """
    most = min(ongoing.values()) + max(_SLACK_CALLS, _SLACK_SHARE * fmean(ongoing.values()))

    def rank(name: str) -> tuple[bool, bytes]:
        return ongoing[name] > most, blake2b(f"{key} {name}".encode(), digest_size=8).digest()

    return sorted(ongoing, key=rank)


_ANY = EngineRequest("", ())


def _request(pending: PendingRequest | None) -> EngineRequest:
    """What is asked of the engine; some calls, such as `info`, hold no request."""
    args: Any = pending.args if pending is not None else ()
    return next((arg for arg in args if isinstance(arg, EngineRequest)), _ANY)
