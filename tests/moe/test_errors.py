from __future__ import annotations

import pickle

from moa_ray.moe.errors import ExpertsLost


def test_lost_experts_are_still_named_behind_an_actor() -> None:
    twin = pickle.loads(pickle.dumps(ExpertsLost([5, 2])))
    assert (twin.experts, str(twin)) == ((2, 5), str(ExpertsLost([2, 5])))
