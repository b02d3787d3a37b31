"""A graph as a DAG of Airflow 3: its layers are task groups, its agents mapped tasks, and a moa-ray server answers.

Airflow is imported when one of the names below is first used; `source` and the provider's info do without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moa_ray.integrations.airflow.export import source
from moa_ray.integrations.needs import need

if TYPE_CHECKING:
    from moa_ray.integrations.airflow.dag import moa_dag
    from moa_ray.integrations.airflow.hook import MoAHook
    from moa_ray.integrations.airflow.operator import MoAOperator
    from moa_ray.integrations.airflow.trigger import MoATrigger

_HOMES = {"MoAHook": "hook", "MoAOperator": "operator", "MoATrigger": "trigger", "moa_dag": "dag"}

__all__ = ["MoAHook", "MoAOperator", "MoATrigger", "moa_dag", "source"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    need("airflow", "apache-airflow-core", "3.2", "airflow")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
