"""The one error of this room."""

from __future__ import annotations

from moa_ray.errors import SpecError


class GateError(SpecError, ValueError):
    """A gate or a Mixture-of-Experts layer was given something that it cannot work with."""
