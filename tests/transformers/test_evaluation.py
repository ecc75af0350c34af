"""The evaluation serves every family: one recorded prefill, copies compressed in many ways."""

from __future__ import annotations

import pytest
import torch
from families import LONG, SUPPORTED

from vlcache_triton.apps.evaluation import Item, Query, compare_all, evaluate_item
from vlcache_triton.integrations.transformers import vl_cache

BUDGET = 0.4
ITEM = Item("tiny", 0, [], ("?",), (), ("1",), max_new_tokens=6)
NOTHING = torch.empty(0, dtype=torch.int64)


class Numbers:
    """A processor that writes tokens as numbers."""

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


def compare_some(budget, attention):
    """One of each kind: with all families, all variants would take long."""
    some = {"vl_cache", "adakv", "mixkv", "tgv_kv", "tuned, no row", "all rows, uniform"}
    oracles = {"attention oracle", "attention oracle, a row"}
    return [v for v in compare_all(budget, attention) if v.name in some | oracles]


@pytest.mark.parametrize("family", [*SUPPORTED, "internvl_gpt_oss"], indirect=True)
def test_variants_answer_as_generate_does(family):
    inputs = family.inputs(LONG)
    compare = compare_all if family.name in ("llava", "gemma3") else compare_some
    query = Query(inputs, NOTHING)
    result = evaluate_item(family.model, Numbers(), ITEM, query, (BUDGET,), compare)
    texts = {row["variant"]: row["text"] for row in result["rows"]}
    length = inputs["input_ids"].shape[1]

    def generate():
        ids = family.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        return Numbers().decode(ids[0, length:].tolist(), True)

    assert texts.pop("full") == generate()
    assert texts.pop("attention oracle") and texts.pop("attention oracle, a row")
    variants = compare(BUDGET, None)
    assert len(variants) >= 6
    for variant in variants:
        with vl_cache(family.model, variant.config, policy=variant.policy):
            assert texts.pop(variant.name) == generate(), variant.name
    assert not texts
