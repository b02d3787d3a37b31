"""A graph as a DAG of Airflow 3: its layers are task groups, its agents mapped tasks, and a moa-ray server answers.

Airflow is imported when one of the names below is first used; `source` and the provider's info do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moa_ray.integrations.airflow.export import source
from moa_ray.integrations.needs import lazily

if TYPE_CHECKING:
    from moa_ray.integrations.airflow.dag import moa_dag
    from moa_ray.integrations.airflow.hook import MoAHook
    from moa_ray.integrations.airflow.operator import MoAOperator
    from moa_ray.integrations.airflow.trigger import MoATrigger

_HOMES = {"MoAHook": "hook", "MoAOperator": "operator", "MoATrigger": "trigger", "moa_dag": "dag"}

__all__ = ["MoAHook", "MoAOperator", "MoATrigger", "moa_dag", "source"]

__getattr__ = lazily(__name__, _HOMES, "airflow", "apache-airflow-core", "3.2", "airflow")
