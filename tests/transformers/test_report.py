"""What a session reports about one prompt."""

from __future__ import annotations

import json

import oracle
import pytest
from checks import GREEDY
from families import LONG, SHORT

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import vl_cache

CONFIG = VLCacheConfig(budget=0.4)


@pytest.fixture
def run(family):
    inputs = family.inputs(LONG, SHORT)
    with vl_cache(family.model, CONFIG) as session:
        assert session.report() is None and session.cache is None
        family.model.generate(**inputs, **GREEDY)
        return family, inputs, session.report()


some_families = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"], indirect=True)


@some_families
def test_sparsity_is_that_of_the_attention_maps(run):
    family, inputs, report = run
    maps = oracle.attention_maps(family, inputs)
    for row, layer in enumerate(report.layers):
        for seq in range(2):
            start = int((inputs["attention_mask"][seq] == 0).sum())
            rows = oracle.query_rows(family, inputs, seq, CONFIG)
            attention = maps[layer][seq, :, start:, start:][:, rows]
            expected = oracle.sparsity(attention, rows, CONFIG.threshold)
            assert report.sparsity[row][seq] == pytest.approx(expected, abs=1e-6)


@some_families
def test_kept_tokens_and_lengths_are_those_of_the_oracle(run):
    family, inputs, report = run
    kept = oracle.kept_tokens(family, inputs, CONFIG)
    assert report.layers == [layer for layer, k in enumerate(kept) if k is not None]
    assert report.kept == [k[:, 0].sum(-1).tolist() for k in kept if k is not None]
    assert report.lengths == inputs["attention_mask"].sum(1).tolist()
    assert report.budget == 0.4


@some_families
def test_bytes_are_those_of_the_keys_and_values(run):
    family, inputs, report = run
    text = family.text_config
    token = 2 * text.num_key_value_heads * 16 * 4  # K and V of 16 fp32 numbers a head
    padded = inputs["input_ids"].numel()  # a dense cache stores pads, too
    assert report.bytes_before == len(report.layers) * padded * token
    assert report.bytes_after == sum(map(sum, report.kept)) * token
    real = len(report.layers) * sum(report.lengths) * token
    assert report.bytes_after == pytest.approx(0.4 * real, rel=0.01)


def test_a_report_is_plain_data(run):
    report = run[2]
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["kept"] == report.kept


def test_a_session_reports_the_last_prompt(family):
    with vl_cache(family.model, CONFIG) as session:
        family.model.generate(**family.inputs(LONG), **GREEDY)
        first = session.report()
        family.model.generate(**family.inputs(SHORT), **GREEDY)
        second = session.report()
    assert (first.lengths, second.lengths) == ([30], [23])
    assert session.report() == second  # and it can still be read after the block
