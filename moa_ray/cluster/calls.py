"""Calls from one deployment to another, and what Ray says when they fail as errors of ours."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from grpc import RpcError
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from moa_ray.errors import ClusterError, MoARayError
from moa_ray.runtime import AnswerDelta, Event

_GRPC_BYTES = 3 * 1024 * 1024
"""Arguments up to this size go over gRPC, whose messages Serve limits to 4 MiB."""
_TRIES = 3
"""Times that a request is sent to routers that die."""


class Method:
    """A method of a deployment, for the path of every request.

    Over gRPC, a call costs less than half the CPU of an actor call; only one that is too big for it becomes one.

    Args:
        handle: The deployment.
        name: The method.
        stream: Whether it is an async generator.
    """

    def __init__(self, handle: DeploymentHandle[Any], name: str, *, stream: bool = False) -> None:
        self._over_grpc = handle.options(method_name=name, stream=stream, _by_reference=False)
        self._as_actor_call = handle.options(method_name=name, stream=stream, _by_reference=True)

    def __call__(self, *args: Any) -> Any:
        """Serve's response: awaited, or iterated over."""
        small = len(pickle.dumps(args)) <= _GRPC_BYTES
        return (self._over_grpc if small else self._as_actor_call).remote(*args)


class RouterLost(ClusterError):
    """A router went away with what it was running."""


def error_of_run(error: BaseException) -> MoARayError:
    """The error that ended a run, out of Ray's wrapping."""
    cause = cause_of(error)
    if isinstance(cause, MoARayError):
        return cause
    lost = isinstance(cause, (ActorDiedError, ActorUnavailableError, RpcError))
    return (RouterLost if lost else ClusterError)(f"the router failed: {in_one_line(cause)}")


def cause_of(error: BaseException) -> BaseException:
    """What was raised in the actor, or what Ray itself raised."""
    cause: BaseException = error.cause if isinstance(error, RayTaskError) else error
    return cause


def in_one_line(error: BaseException) -> str:
    """The error's class and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@contextmanager
def reading(
    response: Any, translate: Callable[[BaseException], MoARayError] = error_of_run
) -> Generator[None, None, None]:
    """While a call's response is read: Ray's errors become ours, and leaving early cancels the call."""
    try:
        yield
    except (RayError, RayServeException, RpcError, MoARayError) as error:
        raise translate(error) from None
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Nobody cancelled us: the replica was taken away, and cancelled what it was doing.
        raise translate(error) from None
    finally:
        response.cancel()


class Sending:
    """One request to routers that may die.

    Where one does before any of the answer was passed on, the request is to be sent again: to another replica, or to
    the one that Serve puts in its place. What the first try has used stays in the account.

        while not sending.done:
            response = ...
            with sending.reading(response):
                ...  # and `sending.passes_on(batch)` for each
    """

    def __init__(self) -> None:
        self.done = False
        self._answering = False
        self._tries = 0

    @contextmanager
    def reading(self, response: Any) -> Generator[None, None, None]:
        """As `reading`; not `done` afterwards, and without an error, where the request is to be sent again."""
        self._tries += 1
        try:
            with reading(response):
                yield
            self.done = True
        except RouterLost:
            if self._answering or self._tries == _TRIES:
                raise

    def passes_on(self, batch: list[Event]) -> None:
        """The reader gets `batch`."""
        self._answering = self._answering or any(isinstance(event, AnswerDelta) for event in batch)
