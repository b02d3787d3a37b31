"""The language model trains with its experts in actors as it does without, to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moa_ray.moe import ConfigError, PoolError
from moa_ray.moe.checkpoint import list_checkpoints, load_checkpoint
from moa_ray.moe.config import load_config
from moa_ray.moe.remote.pool import ExpertPool
from moa_ray.moe.train import Trainer, load_corpus, train
from tests.moe.test_train import same

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]

POOL: dict[str, Any] = {"shards": 2, "num_cpus_per_shard": 0.1, "snapshot_every": 3}


def test_the_language_model_trains_on_a_pool_and_resumes_to_the_same_bits(
    config_file: Callable[..., Path], tmp_path: Path
) -> None:
    here = train(config_file(steps=9), output=tmp_path / "here", show=False)
    train(config_file(steps=5, pool=POOL), output=tmp_path / "there", show=False)
    config = load_config(config_file(steps=9, pool=POOL | {"shards": 3})).model_copy(
        update={"output": tmp_path / "there"}
    )

    class Killing(Trainer):
        def _train_step(self) -> Any:
            if self.step == 7:
                pool: Any = self.model.get_submodule("stack.layers.1.moe").experts
                assert isinstance(pool, ExpertPool)
                os.kill(pool.facts()["shard-1.0"]["pid"], signal.SIGKILL)
            return super()._train_step()

    trainer = Killing(config, load_corpus(config.data))
    trainer.restore()
    there = trainer.run(show=False)
    assert there.perplexity == here.perplexity
    assert same(load_checkpoint(there.checkpoint), load_checkpoint(here.checkpoint))
    again = train(config_file(steps=10), output=tmp_path / "there", resume=True, show=False)  # here once more
    assert again.steps == 10


def test_a_pool_that_cannot_be_is_refused_and_leaves_nothing(config_file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="5 shards for 4 experts"):
        train(config_file(pool=POOL | {"shards": 5}), output=tmp_path / "out", show=False)
    assert not list_checkpoints(tmp_path / "out" / "checkpoints")
    dense = {"d_model": 8, "dropout": 0.1, "middle": {"kind": "dense", "hidden": [8]}}
    with pytest.raises(ConfigError, match=r"pool needs model\.middle\.kind: moe"):
        load_config(config_file(model=dense, pool=POOL))
    with pytest.raises(ConfigError, match="no autocast beside it"):
        load_config(config_file(autocast="bfloat16", pool=POOL))
