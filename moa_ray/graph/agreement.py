"""How far proposals say the same: measures by name, the built-in ones and those of installed packages.

A package brings its own, a semantic one say, by the entry point group `moa_ray.agreement`: a function that takes at
least two texts and returns a number from 0 (nothing in common) to 1 (the same).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import mean

from moa_ray.graph.plugins import Plugins

Measure = Callable[[Sequence[str]], float]


def exact(texts: Sequence[str]) -> float:
    """The share of the texts that is one and the same, case and white space aside."""
    return Counter(" ".join(text.casefold().split()) for text in texts).most_common(1)[0][1] / len(texts)


def words(texts: Sequence[str]) -> float:
    """The mean over all pairs of the words in both among the words in either (Jaccard 1901)."""
    sets = [set(text.casefold().split()) for text in texts]
    return mean(len(one & two) / len(one | two) if one | two else 1.0 for one, two in combinations(sets, 2))


MEASURES: Plugins[Measure] = Plugins("moa_ray.agreement", "measure of agreement", {"exact": exact, "words": words})
