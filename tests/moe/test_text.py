from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.moe import ConfigError
from moa_ray.moe.text import Vocabulary, Windows, read_text


@given(st.text())
def test_bytes_come_back_as_they_were(text: str) -> None:
    raw = text.encode("utf-8", errors="ignore")
    vocabulary = Vocabulary.of(raw, "byte", None)
    assert vocabulary.decode(vocabulary.encode(raw).tolist()).encode() == raw


def test_words_are_numbered_by_falling_frequency_and_rare_ones_are_unknown() -> None:
    vocabulary = Vocabulary.of(b"b a b c\nb a <unk>", "word", 3)
    assert list(vocabulary.words) == ["b", "<unk>", "a"]
    assert vocabulary.decode(vocabulary.encode(b"a zebra b").tolist()) == "a <unk> b"
    assert vocabulary.separator == " "


def test_a_newline_is_a_word_of_its_own() -> None:
    vocabulary = Vocabulary.of(b"a b\nc\n", "word", None)
    assert vocabulary.decode(vocabulary.encode(b"a b\nc").tolist()) == "a b \n c"
    assert len(vocabulary) == 5


def test_the_smallest_vocabulary_still_has_the_unknown_word() -> None:
    assert "<unk>" in Vocabulary.of(b"a a b", "word", 1).words


@given(length=st.integers(20, 200), streams=st.integers(1, 4), steps=st.integers(1, 4))
def test_targets_are_the_next_tokens_and_windows_follow_each_other(length: int, streams: int, steps: int) -> None:
    windows = Windows(torch.arange(length), streams, steps)
    for i in range(len(windows)):
        inputs_SB, targets_SB = windows[i]
        assert inputs_SB.shape == (steps, streams)
        assert torch.equal(targets_SB, inputs_SB + 1)
        if i:
            assert torch.equal(inputs_SB[0], windows[i - 1][0][-1] + 1)
    assert torch.equal(windows[len(windows)][0], windows[0][0])
    assert [windows.starts_text(i) for i in (0, 1, len(windows))] == [True, len(windows) == 1, True]


def test_a_text_too_short_for_one_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="the novel of 10 tokens is too short for 4 streams of 3 steps"):
        Windows(torch.arange(10), 4, 3, name="novel")
    with pytest.raises(ConfigError, match="of 0 tokens"):
        Windows(torch.arange(0), 4, 3)


def test_gzip_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "c.dz").write_bytes(gzip.compress(b"hello"))
    assert read_text(tmp_path / "c.dz") == b"hello"


def test_a_missing_an_empty_and_a_broken_corpus_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"hello")[:-6])
    for name, complaint in [
        ("none.txt", "No such file"),
        ("empty.txt", "is empty"),
        ("broken.gz", "broken gzip"),
    ]:
        with pytest.raises(ConfigError, match=rf"{name}.*{complaint}"):
            read_text(tmp_path / name)
