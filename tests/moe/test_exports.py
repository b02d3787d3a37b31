from __future__ import annotations

import inspect

import moa_ray.moe


def test_all_is_sorted_and_complete() -> None:
    public = {
        name for name, value in vars(moa_ray.moe).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(moa_ray.moe.__all__) == public
    assert len(moa_ray.moe.__all__) == len(public)
