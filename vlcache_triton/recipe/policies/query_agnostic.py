"""One image, many questions: what is kept before any of them is known."""

from __future__ import annotations

import dataclasses

from .keydiff import keydiff
from .policy import Policy


def query_agnostic() -> Policy:
    """A preset of this package: KeyDiff, and a row of the budget for all that is evicted.

    Attention is not looked at, as the rows that will ask are still to come. Compress a prompt that
    ends with its image, and ask on copies of its cache (docs/policies.md).
    """
    policy = keydiff()
    choices = {**policy.choices, "remainder": "mean"}
    return dataclasses.replace(policy, name="query_agnostic", choices=choices)
