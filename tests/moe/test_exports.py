from __future__ import annotations

import inspect
import subprocess
import sys

import moa_ray.moe


def test_all_is_sorted_and_complete() -> None:
    loaded = {n for n, v in vars(moa_ray.moe).items() if not n.startswith("_") and not inspect.ismodule(v)}
    public = (loaded | moa_ray.moe._HOMES.keys()) - {"annotations", "Any", "TYPE_CHECKING", "import_module"}
    assert set(moa_ray.moe.__all__) == public
    assert len(moa_ray.moe.__all__) == len(public)


def test_the_local_layer_does_not_load_ray() -> None:
    code = "import sys; from moa_ray.moe import MoE, LocalExperts; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_lazy_name_is_where_it_is_said_to_be() -> None:
    for name in moa_ray.moe._HOMES:
        assert getattr(moa_ray.moe, name).__name__ == name
