"""How answers are judged, against values worked out by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_triton.apps.evaluation.metrics import (
    anls,
    edit_distance,
    exact_match,
    token_agreement,
    wilson_interval,
)

WORDS = st.text("abc", max_size=6)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("7F3", ["7F3"], True),
        (" 7f3 ", ["7F3"], True),
        ("two  words", ["Two words"], True),
        ("7F", ["7F3"], False),
        ("b", ["a", "b"], True),
        ("", ["a"], False),
    ],
)
def test_exact_match(prediction, answers, expected):
    assert exact_match(prediction, answers) is expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("7F3", ["7F3"], 1.0),
        ("7F30", ["7F3"], 0.75),
        ("abcd", ["abxy"], 0.5),
        ("abcd", ["axyz"], 0.0),  # a quarter is below the threshold
        ("abcd", ["axyz", "abcx"], 0.75),  # the nearest answer counts
        ("", ["a"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls(prediction, answers, expected):
    assert anls(prediction, answers) == expected


@settings(deadline=None)  # the machine may be busy
@given(WORDS, WORDS, WORDS)
def test_edit_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


@settings(deadline=None)  # the machine may be busy
@given(WORDS, st.integers(0, 5), st.sampled_from("xyz"))
def test_an_insertion_is_one_edit(word, place, letter):
    assert edit_distance(word, word[:place] + letter + word[place:]) == 1


def test_known_edit_distances():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("flaw", "lawn") == 2


@pytest.mark.parametrize(
    ("tokens", "expected", "share"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 9, 3], [1, 2, 3], 2 / 3),
        ([1], [1, 2, 3, 4], 0.25),
        ([1, 2, 3, 4], [1, 2], 1.0),
        ([], [1], 0.0),
    ],
)
def test_token_agreement(tokens, expected, share):
    assert token_agreement(tokens, expected) == share


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (90, 100, 0.8256, 0.9448),
    ],
)
def test_wilson_interval(successes, total, low, high):
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=1e-4)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 500), st.data())
def test_the_interval_holds_the_share_and_narrows(total, data):
    successes = data.draw(st.integers(0, total))
    low, high = wilson_interval(successes, total)
    assert 0 <= low <= high <= 1
    assert low - 1e-9 <= successes / total <= high + 1e-9
    wide = high - low
    low, high = wilson_interval(4 * successes, 4 * total)
    assert high - low < wide and not math.isnan(wide)


def test_nothing_tried_is_nothing_known():
    assert wilson_interval(0, 0) == (0.0, 1.0)
