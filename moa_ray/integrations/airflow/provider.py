"""What Airflow's provider manager reads, by the entry point `apache_airflow_provider`. Needs no Airflow."""

from __future__ import annotations

from typing import Any

_HERE = "moa_ray.integrations.airflow"
_NAME = "moa-ray"


def get_provider_info() -> dict[str, Any]:
    """The connection type with its form, and where hook, operator and trigger are."""
    return {
        "package-name": "moa-ray",
        "name": _NAME,
        "description": "Mixture-of-Agents graphs, answered by a moa-ray server.",
        "integrations": [{"integration-name": _NAME, "tags": ["service"]}],
        "hooks": [_modules("hook")],
        "operators": [_modules("operator")],
        "triggers": [_modules("trigger")],
        "connection-types": [
            {
                "connection-type": "moa_ray",
                "hook-class-name": f"{_HERE}.hook.MoAHook",
                "hook-name": _NAME,
                "ui-field-behaviour": {
                    "hidden-fields": ["login", "extra"],
                    "relabeling": {"schema": "Scheme", "password": "API key"},
                    "placeholders": {"host": "127.0.0.1", "port": "8000", "schema": "http"},
                },
            }
        ],
    }


def _modules(name: str) -> dict[str, Any]:
    return {"integration-name": _NAME, "python-modules": [f"{_HERE}.{name}"]}
