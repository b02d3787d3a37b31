"""Ray's errors as ours."""

from __future__ import annotations

from ray.exceptions import RayTaskError

from moa_ray.errors import ClusterError, MoARayError


def error_of_run(error: Exception) -> MoARayError:
    """The error that ended a run, out of Ray's wrapping."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, MoARayError):
        return cause
    first_line = (str(cause).strip().splitlines() or [""])[0]
    return ClusterError(f"the router failed: {type(cause).__name__}: {first_line}")
