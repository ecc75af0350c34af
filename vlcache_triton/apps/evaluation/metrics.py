"""How answers are judged, and how sure a share is."""

from __future__ import annotations

import math
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
Z95 = 1.959964


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is one of the answers, case and outer spaces aside."""
    return _plain(prediction) in map(_plain, answers)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al., ICCV 2019).

    1 - distance / longer length for the nearest answer; 0 where that is below a half.
    """
    best = 0.0
    for answer in answers:
        a, b = _plain(prediction), _plain(answer)
        longer = max(len(a), len(b))
        best = max(best, 1.0 - edit_distance(a, b) / longer if longer else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions, each of cost 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def token_agreement(tokens: Sequence[int], expected: Sequence[int]) -> float:
    """The share of `expected`, the full cache's answer, that stands at the same place in `tokens`.

    Both end with their end-of-sequence token, where they have one.
    """
    same = sum(a == b for a, b in zip(tokens, expected, strict=False))
    return same / len(expected) if expected else 1.0


def wilson_interval(successes: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927); (0, 1) where nothing was tried."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = successes / total, Z95**2
    centre = share + z2 / (2 * total)
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low, high = ((centre + sign * half) / (1 + z2 / total) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
