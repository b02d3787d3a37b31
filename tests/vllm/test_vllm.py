"""vLLM for real, on the CPU, with SmolLM2: `make test-vllm` makes the environment that this needs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import pytest_asyncio
from safetensors.numpy import save_file

from moa_ray.engines import EngineRequest, Sampling, catalogue
from moa_ray.engines.vllm import VLLM, VLLMOptions
from moa_ray.errors import ContextOverflow, EngineRefused
from moa_ray.graph import Message, from_dict
from tests.conftest import HTTP_PORT

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

MODEL = "smollm2-135m-instruct"
WHY: tuple[Message, ...] = ({"role": "user", "content": "Why is the sky blue?"},)


def lora(folder: Path) -> str:
    """An adapter of rank 8 with random weights, which changes what the model says."""
    config = json.loads((Path(catalogue.folder(MODEL)) / "config.json").read_text())
    width, random = config["hidden_size"], np.random.default_rng(0)
    heads = width // config["num_attention_heads"] * config["num_attention_heads"]
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = random.normal(size=(8, width)).astype(np.float32)
        weights[f"{name}.lora_B.weight"] = random.normal(size=(heads, 8)).astype(np.float32)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return str(folder)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> VLLMOptions:
    adapter = lora(tmp_path_factory.mktemp("lora") / "adapter")
    return VLLMOptions(
        device="cpu",
        context_window=1024,
        loras={"pirate": adapter},
        engine_kwargs={"block_size": 32, "max_lora_rank": 8},
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(ray_cluster: None, options: VLLMOptions) -> AsyncIterator[VLLM]:
    made = await VLLM.create(MODEL, options, num_cpus=2)
    yield made
    await made.close()


async def text_of(engine: VLLM, messages: tuple[Message, ...] = WHY, **request: Any) -> str:
    request.setdefault("sampling", Sampling(temperature=0, max_tokens=12))
    return "".join([chunk.text async for chunk in engine.stream(EngineRequest("r", messages, **request))])


async def test_it_tells_its_window_and_counts_prompts_exactly(engine: VLLM) -> None:
    info = await engine.info()
    assert (info.context_window, info.prefix_cache, info.continues) == (1024, True, True)
    chunks = [c async for c in engine.stream(EngineRequest("r", WHY, Sampling(max_tokens=3)))]
    usage = chunks[-1].usage
    assert usage is not None and usage.prompt_tokens == await engine.count_tokens(WHY)
    assert usage.completion_tokens == sum(chunk.tokens for chunk in chunks) == 3
    assert chunks[-1].finish_reason == "length"


async def test_a_warmed_prompt_is_cached(engine: VLLM) -> None:
    drafts = "A draft about something. " * 40
    assert (await engine.warm(EngineRequest("w", ({"role": "user", "content": drafts},)))).cached_tokens == 0
    question: tuple[Message, ...] = ({"role": "user", "content": f"{drafts}And now?"},)
    usage = await engine.warm(EngineRequest("w", question))
    assert usage.cached_tokens > 0.8 * usage.prompt_tokens


async def test_an_answer_that_broke_off_is_continued_and_not_repeated(engine: VLLM) -> None:
    whole = await text_of(engine)
    words = whole.split(" ")
    begun = " ".join(words[:4])
    rest = await text_of(engine, continue_from=begun, sampling=Sampling(temperature=0, max_tokens=6))
    assert whole.startswith(begun + rest[:8])


async def test_closing_the_stream_stops_the_decoding(engine: VLLM) -> None:
    running = engine._server.engine._engine_client.output_processor.request_states
    stream = engine.stream(EngineRequest("r", WHY, Sampling(max_tokens=900, temperature=1.0)))
    await anext(stream)
    assert len(running) == 1
    await stream.aclose()
    async with asyncio.timeout(10):
        while running:
            await asyncio.sleep(0.01)


async def test_an_agents_calls_go_through_its_adapter(engine: VLLM) -> None:
    assert await text_of(engine, agent="pirate") != await text_of(engine, agent="somebody") == await text_of(engine)


async def test_what_does_not_fit_and_what_makes_no_sense_is_told_in_one_line(engine: VLLM) -> None:
    with pytest.raises(ContextOverflow, match="context length"):
        await text_of(engine, ({"role": "user", "content": "word " * 2000},))
    with pytest.raises(EngineRefused, match="temperature"):
        await text_of(engine, sampling=Sampling(temperature=-1.0))


async def test_a_reply_in_a_schema_is_held_to_it(engine: VLLM) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["blue", "red"]}}, "required": ["colour"]}
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}}}
    answer = await text_of(engine, extra=wanted, sampling=Sampling(temperature=0, max_tokens=40))
    assert json.loads(answer)["colour"] in ("blue", "red")


@pytest.fixture
def served(ray_cluster: None) -> Iterator[str]:
    """Two vLLM engines, an agent each, and an aggregator, behind HTTP."""
    from ray import serve

    from moa_ray.cluster.deploy import deploy
    from moa_ray.server import ServerSettings
    from moa_ray.server.deployed import http

    # Half a CPU each: the engine of the tests above still holds one of the cluster's two.
    engine = {"kind": "vllm", "model": MODEL, "device": "cpu", "context_window": 1024, "resources": {"num_cpus": 0.5}}
    graph = from_dict(
        {
            "version": 1,
            "name": "two",
            "engines": {"left": engine, "right": engine},
            "agents": {
                "optimist": {"engine": "left", "system": "See what is good.", "max_tokens": 12},
                "pessimist": {"engine": "right", "system": "See what is bad.", "max_tokens": 12},
                "chief": {"engine": "left", "max_tokens": 16},
            },
            "layers": [["optimist", "pessimist"]],
            "aggregator": "chief",
        }
    )
    deploy([graph], "two", http=http(ServerSettings()), route_prefix="/two", may_grow=True)
    try:
        yield f"http://127.0.0.1:{HTTP_PORT}/two/v1"
    finally:
        serve.delete("two")


async def test_a_graph_of_vllm_agents_answers_over_http(served: str) -> None:
    client = openai.AsyncOpenAI(base_url=served, api_key="none", max_retries=0)
    asked: Any = {"model": "two", "messages": WHY, "stream": True, "stream_options": {"include_usage": True}}
    stream = await client.chat.completions.create(**asked)
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip()
    moa = (chunks[-1].model_extra or {})["moa"]
    assert {a["agent"]: a["state"] for a in moa["agents"]} == dict.fromkeys(
        ("optimist", "pessimist", "chief"), "finished"
    )
