"""Which streaming mode a call can have: what the policy wants, or the best that its engine and its task allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from moa_ray.engines.protocol import Engine
from moa_ray.errors import EngineError
from moa_ray.graph import Call
from moa_ray.runtime.events import Notice
from moa_ray.runtime.journal import Journal
from moa_ray.runtime.plan import Plan

Mode = Literal["barrier", "overlap", "staircase"]


class Modes:
    """The modes of one run's calls.

    Args:
        plan: What is wanted.
        journal: Where it is told, once, that a mode cannot be had.
        engines: An engine for every name in the graph.
    """

    def __init__(self, plan: Plan, journal: Journal, engines: Mapping[str, Engine]) -> None:
        self._plan = plan
        self._journal = journal
        self._engines = engines
        self._told: set[str] = set()

    async def of(self, call: Call) -> Mode:
        """The mode of `call`."""
        wanted = self._plan.policy.streaming
        if wanted == "barrier" or not call.inputs:
            return "barrier"
        name = self._plan.graph.engine_of(call.agent)
        try:
            info = await self._engines[name].info()
        except EngineError:
            return "barrier"  # the call itself will tell
        if not info.prefix_cache:
            return self._instead("barrier", f"engine {name} keeps no beginnings of prompts")
        if wanted == "overlap":
            return "overlap"
        if self._plan.ranks(call):
            return self._instead("overlap", f"{call.agent} picks a proposal, so it must see them whole")
        if self._plan.answers(call) and self._plan.options.extra:
            return self._instead("overlap", f"an answer with {', '.join(self._plan.options.extra)} is written at once")
        if not info.continues:
            return self._instead("overlap", f"engine {name} cannot continue a text")
        return "staircase"

    def _instead(self, mode: Mode, reason: str) -> Mode:
        if reason not in self._told:
            self._told.add(reason)
            text = f"{mode} in place of {self._plan.policy.streaming}: {reason}"
            self._journal.emit(Notice(self._journal.run, self._journal.now, text))
        return mode
