from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.errors import SpecError
from moa_ray.graph import agreement
from tests.runtime.panels import panel


@pytest.mark.parametrize(
    ("texts", "exact", "words"),
    [
        (["42", " 42\n"], 1.0, 1.0),
        (["Yes it is", "yes  IT is", "no"], 2 / 3, 1 / 3),
        (["a b", "b c"], 0.5, 1 / 3),
        (["", ""], 1.0, 1.0),
    ],
)
def test_the_built_in_measures(texts: list[str], exact: float, words: float) -> None:
    assert agreement.MEASURES.find("exact")(texts) == pytest.approx(exact)
    assert agreement.MEASURES.find("words")(texts) == pytest.approx(words)


@given(st.lists(st.text(alphabet="ab ", max_size=8), min_size=2, max_size=5))
def test_agreement_lies_between_nothing_and_one_which_is_that_of_equals(texts: list[str]) -> None:
    for name in ("exact", "words"):
        assert 0 <= agreement.MEASURES.find(name)(texts) <= 1
        assert agreement.MEASURES.find(name)([texts[0]] * 3) == 1


def test_an_unknown_measure_is_refused_with_its_place_and_what_was_meant() -> None:
    with pytest.raises(SpecError, match=r"policy\.early_exit\.measure.*'exacy'"):
        panel(2, spec={"policy": {"early_exit": {"measure": "exacy"}}})
