"""The real model that the tests of engines run on."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from moa_ray.engines import catalogue
from moa_ray.engines.llamacpp import LlamaCpp, LlamaCppOptions


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M; many test processes at once fetch it once, since `resolve` holds a lock meanwhile."""
    return catalogue.resolve("smollm2-135m-instruct")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llama(model_path: Path) -> AsyncGenerator[LlamaCpp, None]:
    """A loaded engine: two slots of 1,024 tokens, one thread."""
    engine = await LlamaCpp.create(str(model_path), LlamaCppOptions(context_window=1024, slots=2), num_cpus=1)
    yield engine
    await engine.close()
