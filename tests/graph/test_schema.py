from __future__ import annotations

from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from moa_ray.graph import json_schema
from tests.conftest import EXAMPLES
from tests.graph.test_loader import SPEC

VALIDATOR = Draft202012Validator(json_schema())


def test_the_schema_is_valid_and_every_key_is_described() -> None:
    Draft202012Validator.check_schema(json_schema())
    models = [json_schema(), *json_schema()["$defs"].values()]
    for model in models:
        for name, key in model.get("properties", {}).items():
            # Where a key's description is that of its own model, it stands there only.
            assert "description" in key or "$ref" in key or name in ("vote", "rank"), (model["title"], name)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_fit_the_schema(path: Any) -> None:
    VALIDATOR.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(("old", "new"), [("policy:", "polcy:"), ("version: 1", "version: 2"), ("0.5", "hot")])
def test_the_schema_refuses_what_the_loader_refuses(old: str, new: str) -> None:
    assert VALIDATOR.is_valid(yaml.safe_load(SPEC))
    assert not VALIDATOR.is_valid(yaml.safe_load(SPEC.replace(old, new, 1)))
