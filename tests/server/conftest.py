from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.server.local import Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(2, reply="{agent} says {prompt}", replies={"chief": "one two three four"}) as served:
        yield served


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    served.engine.calls.clear()
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
