from __future__ import annotations

import asyncio
from typing import Any

import pytest

from moa_ray.engines import EngineRequest, Sampling, Scripted
from moa_ray.errors import DeadlineExceeded, EngineRefused, EngineUnavailable, QuorumNotMet, RequestError
from moa_ray.graph import Message, from_dict
from moa_ray.runtime import (
    AgentCancelled,
    AgentDelta,
    AgentFailed,
    AgentFinished,
    AgentStarted,
    AnswerDelta,
    Event,
    LayerStarted,
    RunFinished,
    Runner,
    RunOptions,
    RunStarted,
)
from tests.runtime.panels import panel, runner


def _prompt(request: EngineRequest) -> str:
    return "\n".join(message["content"] for message in request.messages)


def _of(engine: Scripted, agent: str, layer_call: int = 0) -> EngineRequest:
    return [call for call in engine.calls if call.agent == agent][layer_call]


# ---------------------------------------------------------------- the paper's semantics


@pytest.mark.parametrize(("layers", "calls"), [((6, 6), 13), ((6,), 7), ((3, 3, 3, 3), 13)])
async def test_a_graph_makes_exactly_the_papers_number_of_calls(layers: tuple[int, ...], calls: int) -> None:
    run, engine = panel(*layers)
    result = await run.run("why?")
    assert len(engine.calls) == len(result.agents) == calls


@pytest.mark.parametrize("layout", ["stable", "paper"])
async def test_every_proposal_reaches_every_agent_of_the_next_layer_whole_and_readable(layout: str) -> None:
    replies = {f"a{n}": f"Proposal {n}:\n  it has *lines*, unicode → ü,\n\nand `code`." for n in (1, 2, 3)}
    run, engine = panel(3, 3, spec={"prompt": layout}, replies=replies)
    await run.run("why is the sky blue?")
    later = [call for call in engine.calls if call.agent == "chief"] + [_of(engine, f"a{n}", 1) for n in (1, 2, 3)]
    assert len(later) == 4
    for request in later:
        text = _prompt(request)
        for proposal in replies.values():
            assert text.count(proposal) == 1
        assert "why is the sky blue?" in text


async def test_agents_of_the_first_layer_see_no_proposals() -> None:
    run, engine = panel(3, 3)
    await run.run("why?")
    for agent in ("a1", "a2", "a3"):
        assert _of(engine, agent).messages == ({"role": "user", "content": "why?"},)


async def test_later_layers_see_the_layer_before_only() -> None:
    run, engine = panel(2, 2, 2, reply="{agent} in round {call}")
    await run.run("why?")
    last = _prompt(_of(engine, "chief"))
    assert "a1 in round 3" in last and "a2 in round 3" in last
    assert "in round 2" not in last and "in round 1" not in last


async def test_the_whole_conversation_reaches_every_agent() -> None:
    history: list[Message] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "second question"},
    ]
    run, engine = panel(2, 2, agents={"a1": {"system": "you are a skeptic"}})
    await run.run(history)
    assert len(engine.calls) == 5
    for request in engine.calls:
        roles = [message["role"] for message in request.messages]
        assert roles == ["system", "user", "assistant", "user"]
        for text in ("be brief", "first question", "first answer", "second question"):
            assert text in _prompt(request)
    assert "you are a skeptic" in _prompt(_of(engine, "a1"))
    assert "you are a skeptic" not in _prompt(_of(engine, "a2"))


async def test_proposals_are_capped_and_the_aggregator_is_not() -> None:
    run, engine = panel(2, spec={"proposal_max_tokens": 7}, agents={"a2": {"max_tokens": 3}}, reply_tokens=20)
    result = await run.run("why?")
    assert {call.agent: call.sampling.max_tokens for call in engine.calls} == {"a1": 7, "a2": 3, "chief": None}
    assert result.text.split() == [str(n) for n in range(1, 21)]


async def test_samples_are_independent_calls_with_seeds_of_their_own() -> None:
    run, engine = panel(1, agents={"a1": {"samples": 6, "seed": 10}}, reply="draft {call}")
    await run.run("why?")
    assert [call.sampling.seed for call in engine.calls if call.agent == "a1"] == [10, 11, 12, 13, 14, 15]
    assert all(f"draft {n}" in _prompt(_of(engine, "chief")) for n in range(1, 7))


async def test_proposals_stand_in_the_users_order_however_they_finish() -> None:
    run, engine = panel(3, ttft_s=0.01, slowdown={"a1": 6, "a2": 3, "a3": 0})
    result = await run.run("why?")
    finished = [event.agent for event in result.trace if isinstance(event, AgentFinished)]
    assert finished == ["a3", "a2", "a1", "chief"]
    text = _prompt(_of(engine, "chief"))
    assert text.index("a1 answers") < text.index("a2 answers") < text.index("a3 answers")


async def test_a_free_graph_starts_each_node_when_its_own_inputs_are_in() -> None:
    run, engine = runner(
        from_dict(
            {
                "version": 1,
                "name": "dag",
                "engines": {"script": {"kind": "scripted", "model": "m", "ttft_s": 0.02, "slowdown": {"slow": 20}}},
                "agents": {name: {"engine": "script"} for name in ("quick", "slow", "next", "chief")},
                "nodes": {
                    "q": {"agent": "quick"},
                    "s": {"agent": "slow"},
                    "n": {"agent": "next", "inputs": ["q"]},
                },
                "aggregator": "chief",
            }
        )
    )
    result = await run.run("why?")
    order = [event.call for event in result.trace if isinstance(event, AgentFinished)]
    assert order == ["q", "n", "s", "answer"]
    assert "quick answers" in _prompt(_of(engine, "next"))
    assert "slow answers" in _prompt(_of(engine, "chief")) and "next answers" in _prompt(_of(engine, "chief"))


# ---------------------------------------------------------------- aggregators


async def test_vote_answers_with_a_proposal_of_the_majority_and_calls_nobody_else() -> None:
    run, engine = panel(
        3,
        spec={
            "aggregator": {"vote": {"extract": "number"}},
            "agents": {f"a{n}": {"engine": "script"} for n in (1, 2, 3)},
        },
        replies={"a1": "it is 41", "a2": "so 1,042 it is", "a3": "hence 1042.0"},
    )
    result = await run.run("how much?")
    assert result.text == "so 1,042 it is"
    assert result.source == "1/a2"
    assert result.note == "2 of 3 proposals voted for 1042"
    assert len(engine.calls) == 3


async def test_rank_answers_with_the_proposal_that_the_judge_names() -> None:
    run, engine = panel(3, spec={"aggregator": {"rank": {"agent": "chief"}}}, replies={"chief": "Draft 2 is best"})
    result = await run.run("why?")
    assert result.text == "a2 answers: why?"
    assert result.source == "1/a2"
    assert all(f"a{n} answers: why?" in _prompt(_of(engine, "chief")) for n in (1, 2, 3))


async def test_a_judge_that_names_no_proposal_leaves_the_first_and_says_so() -> None:
    run, _ = panel(2, spec={"aggregator": {"rank": {"agent": "chief"}}}, replies={"chief": "all 9 are fine"})
    result = await run.run("why?")
    assert result.source == "1/a1"
    assert "named none of 2" in result.note


# ---------------------------------------------------------------- events


async def test_events_tell_the_run_in_order() -> None:
    run, _ = panel(2)
    events = [event async for event in run.stream("why?", RunOptions(draft_flush_s=0, answer_flush_s=0))]
    assert isinstance(events[0], RunStarted) and events[0].calls == 3
    assert [(e.layer, e.agents) for e in events if isinstance(e, LayerStarted)] == [(1, ("a1", "a2")), (2, ("chief",))]
    assert len({event.run for event in events}) == 1
    assert [event.t for event in events] == sorted(event.t for event in events)
    drafts = "".join(e.text for e in events if isinstance(e, AgentDelta) and e.agent == "a1")
    assert drafts == "a1 answers: why?"
    end = events[-1]
    assert isinstance(end, RunFinished)
    assert "".join(e.text for e in events if isinstance(e, AnswerDelta)) == end.text
    assert end.source == "answer" and end.finish_reason == "stop"


async def test_no_draft_deltas_are_sent_to_a_reader_who_wants_none() -> None:
    run, _ = panel(2)
    assert not any(isinstance(event, AgentDelta) for event in (await run.run("why?")).trace)


async def test_the_ledger_adds_up_to_what_the_engine_decoded() -> None:
    run, engine = panel(3, 3, reply_tokens=11)
    result = await run.run("why?")
    assert result.usage.completion_tokens == engine.decoded == 7 * 11
    assert result.usage.completion_tokens == sum(record.usage.completion_tokens for record in result.agents)
    assert result.usage.prompt_tokens == sum(record.usage.prompt_tokens for record in result.agents) > 0
    assert all(record.state == "finished" and record.attempts == 1 for record in result.agents)


async def test_two_runs_of_one_runner_share_nothing() -> None:
    run, _ = panel(2, 2, ttft_s=0.01)
    one, two = await asyncio.gather(run.run("first?"), run.run("second?"))
    assert one.trace[0].run != two.trace[0].run
    assert "first?" in one.text and "second?" not in one.text
    assert "second?" in two.text and "first?" not in two.text


# ---------------------------------------------------------------- failures


def _faults(*faults: dict[str, Any]) -> dict[str, Any]:
    return {"faults": list(faults)}


@pytest.mark.parametrize("kind", ["unavailable", "refused"])
async def test_a_failing_agent_is_tolerated_while_one_survives(kind: str) -> None:
    run, engine = panel(3, 3, **_faults({"agent": "a1", "kind": kind}, {"agent": "a2", "kind": kind}))
    result = await run.run("why?")
    assert {record.agent for record in result.agents if record.state == "failed"} == {"a1", "a2"}
    assert "a3 answers" in _prompt(_of(engine, "chief"))
    assert "scripted fault" not in _prompt(_of(engine, "chief"))


async def test_a_hanging_agent_is_given_up_after_its_timeout() -> None:
    run, _ = panel(2, agents={"a1": {"timeout_s": 0.05}}, **_faults({"agent": "a1", "kind": "hang"}))
    result = await run.run("why?")
    record = result.agents[0]
    assert (record.agent, record.state) == ("a1", "failed")
    assert "no complete answer within 0.05 s" in record.error


async def test_a_hanging_agent_without_a_timeout_leaves_the_rest_its_share_of_the_deadline() -> None:
    run, engine = panel(2, spec={"policy": {"deadline_s": 0.4}}, **_faults({"agent": "a1", "kind": "hang"}))
    result = await run.run("why?")
    assert result.text.startswith("chief answers")
    assert engine.active == 0


async def test_below_quorum_the_run_fails_naming_agents_and_reasons() -> None:
    run, engine = panel(
        3, 3, spec={"policy": {"quorum": 2}}, **_faults({"agent": "a1"}, {"agent": "a3", "kind": "refused"})
    )
    with pytest.raises(QuorumNotMet, match=r"1 of 3 agents answered, 2 needed: 1/a1 .*unavailable.*; 1/a3 .*refused"):
        await run.run("why?")
    assert not any(call.agent == "chief" for call in engine.calls)


async def test_a_retryable_failure_is_retried_and_a_final_one_is_not() -> None:
    run, _ = panel(
        2, spec={"policy": {"retries": 2}}, **_faults({"agent": "a1", "times": 2}, {"agent": "a2", "kind": "refused"})
    )
    result = await run.run("why?")
    records = {record.agent: record for record in result.agents}
    assert (records["a1"].state, records["a1"].attempts) == ("finished", 3)
    assert (records["a2"].state, records["a2"].attempts) == ("failed", 1)
    assert [e.will_retry for e in result.trace if isinstance(e, AgentFailed) and e.agent == "a1"] == [True, True]


async def test_a_proposal_that_breaks_off_is_retried_and_only_the_whole_one_is_used() -> None:
    fault = {"agent": "a1", "after_tokens": 2, "times": 1}
    run, engine = panel(1, replies={"a1": "one two three four"}, continues=False, **_faults(fault))
    result = await run.run("why?")
    assert _prompt(_of(engine, "chief")).count("one two") == 1
    assert result.agents[0].usage.completion_tokens == 2 + 4  # the lost tokens were paid for, too
    assert result.agents[0].retries == 1


async def test_the_aggregator_is_retried_before_its_first_token() -> None:
    run, _ = panel(2, **_faults({"agent": "chief", "times": 1}))
    assert (await run.run("why?")).text.startswith("chief answers")


async def test_an_aggregator_that_dies_after_tokens_were_sent_fails_the_run_and_never_repeats_text() -> None:
    fault = {"agent": "chief", "after_tokens": 2}
    run, _ = panel(2, replies={"chief": "one two three"}, continues=False, **_faults(fault))
    events: list[Event] = []
    with pytest.raises(EngineUnavailable):
        async for event in run.stream("why?", RunOptions(answer_flush_s=0)):
            events.append(event)
    end = events[-1]
    assert isinstance(end, RunFinished)
    assert (end.text, end.error, end.finish_reason) == ("one two ", "EngineUnavailable", None)


async def test_an_aggregator_that_refuses_ends_the_run_with_its_error() -> None:
    run, _ = panel(2, **_faults({"agent": "chief", "kind": "refused"}))
    with pytest.raises(EngineRefused):
        await run.run("why?")


async def test_an_empty_proposal_counts_as_failed() -> None:
    run, engine = panel(2, replies={"a1": "  "})
    result = await run.run("why?")
    assert [record.state for record in result.agents] == ["failed", "finished", "finished"]
    assert '<draft number="2">' not in _prompt(_of(engine, "chief"))


async def test_the_deadline_ends_a_run_that_cannot_finish() -> None:
    run, engine = panel(2, spec={"policy": {"deadline_s": 0.1}}, ttft_s=30)
    with pytest.raises((DeadlineExceeded, QuorumNotMet)):
        await run.run("why?")
    assert engine.active == 0


async def test_quorum_and_grace_cut_off_the_straggler() -> None:
    run, engine = panel(
        3, spec={"policy": {"quorum": 2, "grace_s": 0.02}}, itl_s=0.001, reply_tokens=30, slowdown={"a3": 1000}
    )
    result = await run.run("why?")
    cancelled = [event for event in result.trace if isinstance(event, AgentCancelled)]
    assert [event.agent for event in cancelled] == ["a3"]
    assert engine.active == 0
    decoded = engine.decoded
    await asyncio.sleep(0.05)
    assert engine.decoded == decoded


async def test_closing_the_stream_stops_every_engine_call() -> None:
    run, engine = panel(3, itl_s=0.01, reply_tokens=1000)
    events = run.stream("why?")
    async for event in events:
        if isinstance(event, AgentStarted):
            break
    await events.aclose()
    assert engine.active == 0
    decoded = engine.decoded
    await asyncio.sleep(0.05)
    assert engine.decoded == decoded


@pytest.mark.parametrize("prompt", ["", "  \n", [], [{"role": "assistant", "content": "hello"}]])
async def test_a_prompt_without_a_question_is_refused_before_any_call(prompt: Any) -> None:
    run, engine = panel(2)
    with pytest.raises(RequestError):
        await run.run(prompt)
    assert not engine.calls


# ---------------------------------------------------------------- context preflight


def _words(count: int, word: str = "word") -> str:
    return " ".join(f"{word}{n}" for n in range(count))


async def test_an_overflowing_prompt_loses_its_oldest_exchange_first_and_the_event_says_so() -> None:
    history: list[Message] = [
        {"role": "user", "content": _words(200, "old")},
        {"role": "assistant", "content": _words(200, "older")},
        {"role": "user", "content": "recent words"},
        {"role": "assistant", "content": "recent reply"},
        {"role": "user", "content": "the question"},
    ]
    run, engine = panel(1, spec={"proposal_max_tokens": 10}, context_window=300)
    result = await run.run(history)
    first = engine.calls[0]
    assert [message["content"] for message in first.messages] == ["recent words", "recent reply", "the question"]
    started = next(event for event in result.trace if isinstance(event, AgentStarted))
    assert started.trimmed == ("left out the 1 oldest of 2 earlier exchanges",)


async def test_an_overflowing_set_of_proposals_loses_the_tail_of_the_longest() -> None:
    replies = {"a1": _words(400), "a2": "short and whole", "chief": "done"}
    run, engine = panel(2, context_window=400, spec={"proposal_max_tokens": 300}, replies=replies)
    result = await run.run("why?")
    request = _of(engine, "chief")
    text = _prompt(request)
    assert "short and whole" in text and "word0 word1" in text and "word299" not in text
    assert await engine.count_tokens(request.messages) <= 300  # a quarter of the window is kept for the answer
    trimmed = [event.trimmed for event in result.trace if isinstance(event, AgentStarted) and event.agent == "chief"]
    assert trimmed[0][0].startswith("cut proposal 1 to ")


async def test_a_question_that_cannot_fit_is_told_with_the_sizes() -> None:
    run, _ = panel(1, context_window=40)
    with pytest.raises(QuorumNotMet, match="window of script has 40 tokens"):
        await run.run(_words(100))


# ---------------------------------------------------------------- a plug-in's engine


async def test_an_engine_whose_stream_just_stops_counts_as_failed() -> None:
    graph = panel(2)[0].graph

    class Silent(Scripted):
        async def stream(self, request: EngineRequest):  # type: ignore[no-untyped-def]
            async for chunk in super().stream(request):
                if chunk.finish_reason is None:
                    yield chunk

    with pytest.raises(QuorumNotMet, match="ended without saying why"):
        await Runner(graph, {"script": Silent()}).run("why?")


# ---------------------------------------------------------------- what a request may wish for

TOOLS: dict[str, Any] = {"tools": [{"type": "function", "function": {"name": "look_up"}}]}


async def test_one_agent_can_be_asked_alone() -> None:
    run, engine = panel(3, reply="{agent} says {prompt}")
    result = await run.run("why?", RunOptions(agent="a2"))
    assert result.text == "a2 says why?"
    assert [call.agent for call in engine.calls] == ["a2"] and len(result.agents) == 1


async def test_sampling_of_a_request_goes_to_the_answer_and_not_to_the_proposals() -> None:
    run, engine = panel(2, agents={"a1": {"temperature": 0.9, "max_tokens": 7}})
    await run.run("why?", RunOptions(sampling=Sampling(0.1, 0.5, 3, None, ("END",))))
    answer, proposal = _of(engine, "chief").sampling, _of(engine, "a1").sampling
    assert (answer.temperature, answer.top_p, answer.max_tokens, answer.stop) == (0.1, 0.5, 3, ("END",))
    assert (proposal.temperature, proposal.max_tokens, proposal.stop) == (0.9, 7, ())


async def test_a_seed_of_a_request_gives_every_call_its_own_and_always_the_same() -> None:
    run, engine = panel(3)
    for _ in range(2):
        await run.run("why?", RunOptions(sampling=Sampling(seed=5)))
    seeds = [(call.agent, call.sampling.seed) for call in engine.calls]
    assert sorted(seeds[:4]) == sorted(seeds[4:])
    assert len({seed for _, seed in seeds[:4]}) == 4


async def test_tools_reach_the_aggregator_alone_and_its_call_of_one_is_the_answer() -> None:
    run, engine = panel(2, tool_call={"name": "look_up", "arguments": {"x": 1}})
    events = [event async for event in run.stream("why?", RunOptions(extra=TOOLS))]
    assert [call.agent for call in engine.calls if call.extra] == ["chief"]
    (delta,) = (event for event in events if isinstance(event, AnswerDelta))
    assert delta.tool_calls[0]["function"] == {"name": "look_up", "arguments": '{"x": 1}'}
    assert isinstance(events[-1], RunFinished) and events[-1].finish_reason == "tool_calls"


async def test_the_result_of_a_tool_is_answered_with_text() -> None:
    run, _ = panel(2, tool_call={"name": "look_up"}, reply="{agent}: done")
    call = {"id": "c", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    messages: list[Message] = [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "because", "tool_call_id": "c"},
    ]
    assert (await run.run(messages, RunOptions(extra=TOOLS))).text == "chief: done"
