"""The JSON Schema of a spec, for editors: `# yaml-language-server: $schema=moa-ray.schema.json`."""

from __future__ import annotations

from typing import Any

from moa_ray.graph.spec import GraphSpec


def json_schema() -> dict[str, Any]:
    """The schema of `GraphSpec`, JSON Schema draft 2020-12."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **GraphSpec.model_json_schema()}
