"""Ray's errors as ours."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from moa_ray.errors import ClusterError, MoARayError


def error_of_run(error: Exception) -> MoARayError:
    """The error that ended a run, out of Ray's wrapping."""
    cause = cause_of(error)
    return cause if isinstance(cause, MoARayError) else ClusterError(f"the router failed: {in_one_line(cause)}")


def cause_of(error: Exception) -> Exception:
    """What was raised in the actor, or what Ray itself raised."""
    cause: Exception = error.cause if isinstance(error, RayTaskError) else error
    return cause


def in_one_line(error: Exception) -> str:
    """The error's class and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@contextmanager
def reading(response: Any, translate: Callable[[Exception], MoARayError] = error_of_run) -> Generator[None, None, None]:
    """While a call's response is read: Ray's errors become ours, and leaving early cancels the call."""
    try:
        yield
    except (RayError, RayServeException) as error:
        raise translate(error) from None
    finally:
        response.cancel()
