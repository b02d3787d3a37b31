"""KubeRay's own schemas, as the API server of Kubernetes would apply them, and stricter."""

from __future__ import annotations

import gzip
import json
from functools import cache
from typing import Any

from tests.commands import ROOT


@cache
def schema_of(kind: str) -> Any:
    """The schema of `rayservice` or `rayjob`; see data/README.md."""
    packed = (ROOT / "tests" / "data" / f"{kind}.schema.json.gz").read_bytes()
    found = _strict(json.loads(gzip.decompress(packed)))
    found["properties"]["metadata"] = {"type": "object"}
    return found


def _strict(schema: Any) -> Any:
    """Kubernetes drops keys that it does not know; here they are errors."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        inner.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return inner
