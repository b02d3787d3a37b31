"""Overlap: while proposals are being written, what is certain of the prompts that will hold them is prefilled.

A warm-up goes to the engine as a call with the beginning of the prompt to come; the call itself then finds that
beginning in the engine's prefix cache. It changes nothing of what is asked, so the text is that of `barrier`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

from moa_ray.engines.protocol import Engine, EngineRequest, Usage
from moa_ray.errors import EngineError
from moa_ray.graph import Call, Message
from moa_ray.runtime import context
from moa_ray.runtime.events import AgentWarmed
from moa_ray.runtime.journal import Journal
from moa_ray.runtime.plan import Plan

_LEAST_WORDS = 32
"""A warm-up costs a call and a token; less new text than this is not worth one."""
_LONGEST_S = 30.0
"""A warm-up that takes longer is given up: the call that waits for it had better begin."""


class Overlap:
    """Warms the prompts of one run.

    Args:
        plan: What each call asks.
        journal: Where the proposals' texts come from, and the warm-ups are told.
        engines: An engine for every name in the graph.
    """

    def __init__(self, plan: Plan, journal: Journal, engines: Mapping[str, Engine]) -> None:
        self._plan = plan
        self._journal = journal
        self._engines = engines
        self._warming: set[tuple[str, str, tuple[str, ...]]] = set()

    @asynccontextmanager
    async def ahead(self, call: Call) -> AsyncGenerator[None, None]:
        """While the context is open, the inputs of `call` are being written, and its prompt is warmed.

        Leaving it waits for the warm-up on its way: it prefills what the call needs, and an engine shows it to
        other calls only when it is done.
        """
        key = (self._plan.graph.engine_of(call.agent), self._plan.affinity(call), call.inputs)
        if key in self._warming:  # a prompt like this one's is being warmed already
            yield
            return
        self._warming.add(key)
        on_its_way = asyncio.Lock()
        warming = asyncio.create_task(self._follow(call, on_its_way))
        try:
            yield
            async with on_its_way:
                pass
        finally:
            warming.cancel()
            await asyncio.wait({warming})
        if not warming.cancelled():
            warming.result()

    async def _follow(self, call: Call, on_its_way: asyncio.Lock) -> None:
        """Warm the prompt of `call` as it grows, for as long as it pays."""
        words, warmed = 0, Usage()
        while True:
            news = self._journal.drafts.news
            try:
                messages = await self._certain(call)
                if not messages:
                    return
                if (now := len(messages[-1]["content"].split())) >= words + _LEAST_WORDS:
                    async with on_its_way, asyncio.timeout(_LONGEST_S):
                        usage = await self._warm(call, messages)
                    if usage.prompt_tokens:  # else the engine had no room for it
                        if usage.cached_tokens < warmed.prompt_tokens / 2:
                            return  # what was warmed before is gone: it does not pay
                        words, warmed = now, usage
            except (EngineError, TimeoutError):
                return  # what is wrong with the engine, the call itself will tell
            await news.wait()

    async def _certain(self, call: Call) -> tuple[Message, ...]:
        """The beginning of the prompt of `call` as far as it is known; nothing where there is none to rely on."""
        drafts = {name: draft for name in call.inputs if not (draft := self._journal.drafts[name]).lost}
        prompt = self._plan.prompt(call, {name: draft.text for name, draft in drafts.items()})
        engine = self._engines[self._plan.graph.engine_of(call.agent)]
        _, trimmed = await context.fit(prompt, engine, await engine.info(), self._plan.sampling(call).max_tokens)
        return () if trimmed else prompt.growing([draft.complete for draft in drafts.values()])

    async def _warm(self, call: Call, messages: tuple[Message, ...]) -> Usage:
        plan, journal, engine = self._plan, self._journal, self._plan.graph.engine_of(call.agent)
        started = journal.now
        request = EngineRequest(
            f"{journal.run}/{call.id}/warm",
            messages,
            plan.sampling(call),
            agent=call.agent,
            affinity=plan.affinity(call),
        )
        usage = await self._engines[engine].warm(request)
        if usage.prompt_tokens:
            head = (journal.run, journal.now, call.id, call.agent, engine, call.layer, 1)
            journal.emit(AgentWarmed(*head, journal.now - started, usage))
        return usage
