"""Errors of the Mixture-of-Experts room that are not the gate's."""

from __future__ import annotations

from collections.abc import Collection

from moa_ray.errors import ClusterError, MoARayError, SpecError


class CheckpointError(SpecError):
    """A checkpoint is missing, damaged, or of another model than the one it is loaded into."""


class ConfigError(SpecError, ValueError):
    """A training configuration is wrong; the message names the file and the key."""


class TrainingError(MoARayError):
    """Training cannot go on, as when the loss is no longer a number."""


class PoolError(SpecError):
    """A pool of experts cannot be what was asked for."""


class PoolLost(ClusterError):
    """Expert shards did not answer, or did not come back, within the time they have."""


class StalePool(PoolLost):
    """A caller knows an older state of the pool than its workers, and cannot learn the newer one."""


class PoisonedBatch(MoARayError):
    """A batch killed the shards that it was sent to, and is not sent again."""


class ExpertsLost(PoolLost):
    """Some experts went while they computed; whoever can do without them masks them and asks again.

    Args:
        experts: Those without a living holder.
    """

    def __init__(self, experts: Collection[int]) -> None:
        self.experts = tuple(sorted(experts))
        hint = "wait for their shard's restart, or use replicas"
        super().__init__(f"no living shard holds experts {list(self.experts)}", hint=hint)
