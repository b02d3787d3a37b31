"""Errors of the Mixture-of-Experts room that are not the gate's."""

from __future__ import annotations

from moa_ray.errors import MoARayError, SpecError


class CheckpointError(SpecError):
    """A checkpoint is missing, damaged, or of another model than the one it is loaded into."""


class ConfigError(SpecError, ValueError):
    """A training configuration is wrong; the message names the file and the key."""


class TrainingError(MoARayError):
    """Training cannot go on, as when the loss is no longer a number."""
