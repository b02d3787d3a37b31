"""Experts of a model that leave this process for the actors of a pool, for as long as it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor

from moa_ray.moe.config import PoolConfig
from moa_ray.moe.experts import LocalExperts
from moa_ray.moe.layer import MoE
from moa_ray.moe.model import LanguageModel
from moa_ray.moe.optim import MOMENTS, WEIGHTS, Adam


@contextmanager
def experts_in_actors(model: LanguageModel, optimizer: Adam, config: PoolConfig | None, step: int) -> Iterator[None]:
    """Moves the experts of all layers, their moments included; the actors end with the block.

    The model cannot be called after it.

    Args:
        model: Has local experts.
        optimizer: Of the model.
        config: None: the experts stay where they are.
        step: Optimizer steps done.

    Raises:
        PoolError: More shards than experts.
        ResourcesShort: A shard has nowhere to run.
    """
    if config is None:
        yield
        return
    from moa_ray.moe.remote.pool import ExpertPool
    from moa_ray.moe.remote.snapshot import Loaded

    state = optimizer.state()
    with ExitStack() as pools:
        placed: dict[str, ExpertPool] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, MoE) and isinstance(layer.experts, LocalExperts):
                place, local = f"{name}.experts", layer.experts
                moments: dict[str, Tensor] = {
                    f"{weight}.{moment}": state[f"optimizer/{place}.{weight}/{moment}"]
                    for weight in WEIGHTS
                    for moment in MOMENTS
                    if step
                }
                weights = {weight: tensor.detach() for weight, tensor in local.state_dict().items()}
                loaded = Loaded(weights | moments, version=step)
                pool = ExpertPool.of(local, loaded=loaded, **config.model_dump())
                placed[place] = pools.enter_context(pool)
                del layer.experts
                layer.experts = pool
        optimizer.leave_to(placed)
        yield
