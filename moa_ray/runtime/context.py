"""Context preflight: a prompt that would overflow its engine's window is shortened by a stated rule.

First the oldest exchanges go, one by one (a user's turn and its replies); if that is not
enough, the longest proposals are cut to a common length. What was done is said in the call's
`agent.started` event. The answer keeps its room: `max_tokens`, or a quarter of the window.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from moa_ray.engines.protocol import Engine, EngineInfo
from moa_ray.errors import ContextOverflow
from moa_ray.graph.messages import Message
from moa_ray.graph.prompts import Prompt

_TEMPLATE_TOKENS = 16
"""More than any chat template we know spends on one message."""


async def fit(
    prompt: Prompt, engine: Engine, info: EngineInfo, max_tokens: int | None
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The prompt's messages, shortened to fit the window of `engine`, and what was cut, in words.

    Raises:
        ContextOverflow: If not even the bare question fits.
    """
    messages = prompt.messages()
    if info.context_window is None:
        return messages, ()
    room = info.context_window - (max_tokens or info.context_window // 4)
    if _most_tokens(messages) <= room:  # the common case, without asking the engine
        return messages, ()

    async def fits(candidate: Prompt) -> bool:
        return await engine.count_tokens(candidate.messages()) <= room

    if await fits(prompt):
        return messages, ()
    trimmed: list[str] = []

    exchanges = len(prompt.exchanges)
    if exchanges:
        dropped = await _first(lambda n: fits(prompt.without_exchanges(n)), 1, exchanges)
        trimmed.append(f"left out the {dropped or exchanges} oldest of {exchanges} earlier exchanges")
        if dropped is not None:
            return prompt.without_exchanges(dropped).messages(), tuple(trimmed)
        prompt = prompt.without_exchanges(exchanges)

    longest = max(map(len, prompt.proposals), default=0)
    cut = await _first(lambda n: fits(prompt.with_proposals_cut(longest - n)), 1, longest)
    if cut is None:
        raise ContextOverflow(
            f"the prompt does not fit: the window of {info.model} has {info.context_window} tokens, "
            f"of which {info.context_window - room} are kept for the answer",
            hint="shorten the question or the system prompts, lower max_tokens, or use a model with a larger window",
        )
    shortened = [str(n) for n, text in enumerate(prompt.proposals, 1) if len(text) > longest - cut]
    trimmed.append(f"cut proposal {', '.join(shortened)} to {longest - cut} characters")
    return prompt.with_proposals_cut(longest - cut).messages(), tuple(trimmed)


def _most_tokens(messages: tuple[Message, ...]) -> int:
    """An upper bound: every known tokenizer's token holds at least one byte."""
    return sum(len(message["content"].encode()) + _TEMPLATE_TOKENS for message in messages)


async def _first(holds: Callable[[int], Awaitable[bool]], low: int, high: int) -> int | None:
    """The smallest n of low..high for which `holds`, given that it holds for all greater n; None if for none."""
    if low > high or not await holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if await holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
