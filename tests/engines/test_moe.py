"""The engine whose experts are actors: the text of the whole model, streamed, stopped, cut off, counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from moa_ray.engines import EngineRequest, Sampling
from moa_ray.engines.moe import MoEEngine, MoEOptions, _Answer
from moa_ray.engines.protocol import Chunk
from moa_ray.errors import ContextOverflow, EngineRefused, EngineUnavailable, ModelNotFound
from tests.engines import tiny_moe

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.asyncio(loop_scope="module"),
]

OPTIONS = MoEOptions(shards=2, num_cpus_per_shard=0.1)
ASK = EngineRequest("r", ({"role": "user", "content": "Moa?"},), Sampling(temperature=0, max_tokens=20))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("tiny-moe")
    return directory, tiny_moe.write(directory)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(whole: tuple[Path, Any], ray_cluster: None) -> AsyncGenerator[MoEEngine, None]:
    engine = await MoEEngine.create(str(whole[0]), OPTIONS, num_cpus=1)
    yield engine
    await engine.close()


async def answer(engine: MoEEngine, request: EngineRequest) -> tuple[str, list[Chunk]]:
    chunks = [chunk async for chunk in engine.stream(request)]
    return "".join(chunk.text for chunk in chunks), chunks


def sampled(**changes: Any) -> EngineRequest:
    return replace(ASK, sampling=replace(ASK.sampling, **changes))


async def test_the_text_is_that_of_the_whole_model(engine: MoEEngine, whole: tuple[Path, Any]) -> None:
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(whole[0])
    prompt = tokenizer.apply_chat_template(list(ASK.messages), add_generation_prompt=True, return_dict=False)
    made = whole[1].generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    text, chunks = await answer(engine, ASK)
    assert text.rstrip("\N{REPLACEMENT CHARACTER}") == tokenizer.decode(made[0, len(prompt) :]).rstrip("\ufffd")
    assert text
    last = chunks[-1]
    assert last.finish_reason == "length"
    assert last.usage and (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), 20)
    assert sum(chunk.tokens for chunk in chunks) == 20
    assert await engine.count_tokens(ASK.messages) == len(prompt)


async def test_a_seed_repeats_a_draw_and_others_differ(engine: MoEEngine) -> None:
    draws = [sampled(temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    texts = [text for text, _ in await asyncio.gather(*(answer(engine, draw) for draw in draws))]
    assert texts[0] == texts[1] != texts[2]


async def test_an_answer_ends_before_a_stop_string_and_can_be_continued(engine: MoEEngine) -> None:
    text, _ = await answer(engine, ASK)
    cut = text[3:5]
    stopped, chunks = await answer(engine, sampled(stop=(cut,)))
    assert stopped == text[: text.index(cut)]
    assert chunks[-1].finish_reason == "stop"
    rest, _ = await answer(engine, replace(ASK, continue_from=text[:2], sampling=Sampling(temperature=0, max_tokens=5)))
    assert rest
    assert (await engine.info()).continues


async def test_closing_the_stream_ends_the_decoding(engine: MoEEngine) -> None:
    steps: list[int] = []
    model: Any = engine._opened._model
    handle = model.register_forward_pre_hook(lambda *_: steps.append(1))
    try:
        async with aclosing(engine.stream(sampled(max_tokens=200))) as chunks:
            async for _ in chunks:
                break
        taken = len(steps)
        await asyncio.sleep(0.2)
        assert len(steps) <= taken + 1
    finally:
        handle.remove()


async def test_what_does_not_fit_is_refused(engine: MoEEngine, whole: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ContextOverflow, match="the window holds 256"):
        await answer(engine, replace(ASK, messages=({"role": "user", "content": "x" * 300},)))
    with pytest.raises(ModelNotFound):
        await MoEEngine.create("no/such/folder", OPTIONS, num_cpus=1)
    with pytest.raises(EngineRefused, match="5 shards for 4 experts"):
        await MoEEngine.create(str(whole[0]), MoEOptions(shards=5), num_cpus=1)
    with pytest.raises(EngineRefused, match=r"bundle 0 of 1 \(shard-0.0: 99 CPU\) cannot be placed"):
        await MoEEngine.create(str(whole[0]), MoEOptions(num_cpus_per_shard=99, placement_timeout_s=0.5), num_cpus=1)
    tiny_moe.write(tmp_path, template=None)
    with pytest.raises(EngineRefused, match="no chat template"):
        await MoEEngine.create(str(tmp_path), OPTIONS, num_cpus=1)


async def test_a_closed_engine_says_so(whole: tuple[Path, Any]) -> None:
    engine = MoEEngine("m", None, OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(EngineUnavailable, match="engine is closed"):
        await answer(engine, ASK)
    await engine.close()


async def test_what_may_become_a_stop_string_is_held_back() -> None:
    text = _Answer(("END", "Ex"))
    assert not text.ends_with("abE") and text.take() == "ab"
    assert not text.ends_with("N") and text.take() == ""
    assert not text.ends_with("o") and text.take() == "ENo"
    assert text.ends_with("Exact") and text.rest() == ""
