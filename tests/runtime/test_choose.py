from __future__ import annotations

import pytest

from moa_ray.graph.spec import Vote
from moa_ray.runtime.choose import picked, vote


@pytest.mark.parametrize(
    ("rule", "texts", "winner"),
    [
        (Vote(), ["it is 7", "so 8", "8.0 then"], 1),
        (Vote(), ["$1,200.50", "1200.5", "12"], 0),
        (Vote(), ["-3 degrees", "3 degrees", "we get -3"], 0),
        (Vote(extract="choice"), ["A or B? B", "I say B.", "A"], 0),
        (Vote(extract="last_line"), ["thinking\nParis", "so\n\nParis  \n", "Rome"], 0),
        (Vote(extract="regex", pattern=r"answer: (\w+)"), ["answer: no", "answer: no, answer: yes", "answer: yes"], 1),
    ],
)
def test_the_most_frequent_answer_wins(rule: Vote, texts: list[str], winner: int) -> None:
    assert vote(texts, rule)[0] == winner


def test_a_tie_goes_to_the_answer_that_comes_first() -> None:
    assert vote(["5", "6", "6", "5"], Vote()) == (0, "2 of 4 proposals voted for 5")


def test_a_vote_counts_as_much_as_the_gate_says() -> None:
    assert vote(["5", "6", "6"], Vote(), (0.6, 0.2, 0.2)) == (0, "1 of 3 proposals voted for 5 with 60% of the weight")
    assert vote(["5", "6", "6"], Vote(), (0.4, 0.3, 0.3))[0] == 1


def test_proposals_without_an_answer_do_not_vote() -> None:
    assert vote(["no idea", "none", "42"], Vote())[0] == 2


def test_without_any_answer_the_first_proposal_is_taken_and_the_note_says_so() -> None:
    index, note = vote(["no idea", "none"], Vote())
    assert index == 0 and "none of 2 proposals" in note


@pytest.mark.parametrize(("verdict", "index"), [("2", 1), ("Draft 3 is best", 2), ("not 9 but 1", 0)])
def test_the_judge_is_understood(verdict: str, index: int) -> None:
    assert picked(verdict, 3)[0] == index
