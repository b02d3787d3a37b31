from __future__ import annotations

import openai
import pytest

from tests.server.local import Served, serving


def test_text_in_text_out(client: openai.OpenAI) -> None:
    response = client.responses.create(model="panel", input="why?")
    assert (response.output_text, response.status) == ("one two three four", "completed")
    assert response.usage and response.usage.output_tokens == 10
    assert len((response.model_extra or {})["moa"]["agents"]) == 3


def test_instructions_and_turns_reach_the_agents(client: openai.OpenAI, served: Served) -> None:
    client.responses.create(
        model="panel",
        instructions="be brief",
        input=[
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "answer"},
            {"role": "user", "content": [{"type": "input_text", "text": "second"}]},
        ],
    )
    first = next(call for call in served.engine.calls if call.agent == "a1")
    assert [message["content"] for message in first.messages] == ["be brief", "first", "answer", "second"]


def test_a_stream_tells_the_text_in_typed_events(client: openai.OpenAI) -> None:
    with client.responses.stream(model="panel", input="why?") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "one two three four"
    assert final.output_text == "one two three four" and final.usage
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)


def test_an_answer_that_was_cut_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(model="panel", input="why?", max_output_tokens=2)
    assert response.status == "incomplete" and response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"


def test_what_is_not_kept_cannot_be_referred_to(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id: not supported"):
        client.responses.create(model="panel", input="why?", previous_response_id="resp_1")


def test_a_failure_in_mid_stream_is_an_error_and_no_completion() -> None:
    faults = [{"agent": "chief", "after_tokens": 2}]
    with serving(2, replies={"chief": "one two three"}, itl_s=0.05, faults=faults) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        seen: list[str] = []
        with pytest.raises(openai.APIError, match="scripted fault"):
            for event in client.responses.create(model="panel", input="why?", stream=True):
                seen.append(event.type)
        assert "response.output_text.delta" in seen and "response.completed" not in seen
