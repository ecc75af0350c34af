"""An item's evaluation against the public way of doing the same: generate in a vl_cache block."""

import json

import pytest
import torch

from vlcache_triton import VLCacheConfig
from vlcache_triton.apps.evaluation import (
    SUITES,
    Recording,
    Variant,
    compare_all,
    encode_form,
    evaluate_item,
    form_item,
    read_results,
    run,
)
from vlcache_triton.apps.evaluation.decode import full_answer
from vlcache_triton.apps.evaluation.run import _batches
from vlcache_triton.integrations.transformers import vl_cache

SUITE = {suite.name: suite for suite in SUITES}
BUDGETS = (0.3,)


@pytest.fixture(scope="module")
def value_item(form_reader):
    item = form_item(SUITE["value"], 1)
    return item, encode_form(form_reader[1], item, form_reader[0].device)


@pytest.fixture(scope="module")
def evaluated(form_reader, value_item):
    return evaluate_item(*form_reader, *value_item, BUDGETS)


def generate(form_reader, item, query, variant=None):
    """The answer's text by model.generate, compressed as the variant says."""
    model, processor = form_reader
    kwargs = dict(query.inputs, max_new_tokens=item.max_new_tokens, do_sample=False)
    if variant is None:
        ids = model.generate(**kwargs)
    else:
        with vl_cache(model, variant.config, policy=variant.policy):
            ids = model.generate(**kwargs)
    return processor.decode(ids[0, query.inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_every_variant_answers_as_generate_does(form_reader, value_item, evaluated):
    rows = {(row["variant"], row["budget"]): row for row in evaluated["rows"]}
    assert rows.pop(("full", 1.0))["text"] == generate(form_reader, *value_item)
    variants = [v for budget in BUDGETS for v in compare_all(budget, None)]
    assert len(rows) == len(variants) + 2 * len(BUDGETS)  # and the oracle, with a row and without
    for variant in variants:
        row = rows[variant.name, variant.config.budget]
        assert row["text"] == generate(form_reader, *value_item, variant).strip(), variant.name


def test_the_numbers_of_an_item(form_reader, value_item, evaluated):
    item, query = value_item
    model = form_reader[0]
    length = query.inputs["input_ids"].shape[1]
    full, *others = evaluated["rows"]
    text = model.config.text_config
    row_bytes = 2 * 64 * 4 * text.num_key_value_heads * text.num_hidden_layers
    assert full["kv_bytes"] == row_bytes * length
    assert (full["hit_rate"], full["agreement"]) == (1.0, 1.0)
    for row in others:
        assert row["kv_bytes"] == pytest.approx(row["budget"] * full["kv_bytes"], rel=0.01)
        assert 0 < row["hit_rate"] < 1
        assert row["exact"] == (row["text"].lower() == item.answers[0].lower())
        if row["text"] == full["text"]:
            assert row["agreement"] == 1.0
    hits = {(row["variant"], row["budget"]): row["hit_rate"] for row in others}
    for budget in BUDGETS:
        assert hits["attention oracle", budget] > hits["vl_cache", budget] > hits["random", budget]
    assert json.loads(json.dumps(evaluated)) == evaluated


def test_the_answers_attention_is_that_of_eager_attention(form_reader, value_item, eager_maps):
    model, _ = form_reader
    item, query = value_item
    with vl_cache(model, VLCacheConfig(budget=1.0), cuda_graph=False):
        tokens, attention = full_answer(Recording(model, query, item.max_new_tokens))
    ids = torch.cat([query.inputs["input_ids"], torch.tensor([tokens[:-1]])], 1)
    num_rows, length = len(tokens) - 1, query.inputs["input_ids"].shape[1]
    assert num_rows >= 1 and attention.shape == (8, 2, length)
    for layer, maps in enumerate(eager_maps(query, ids)):
        expected = maps[0, :, -num_rows:, :length].sum(1).view(2, 4, length).mean(1)
        torch.testing.assert_close(attention[layer], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["value, 3 turns", "value, 2 images"])
def test_other_suites_answer_as_generate_does(form_reader, name):
    """Several images; and a later turn, which generate is given behind the compressed prompt."""
    model, processor = form_reader
    item = form_item(SUITE[name], 0)
    query = encode_form(processor, item, model.device)
    result = evaluate_item(
        model, processor, item, query, (0.4,), lambda b, _: [Variant("x", CONFIG)]
    )
    full, compressed = (row["text"] for row in result["rows"])
    assert full == _by_hand(form_reader, item, query, VLCacheConfig(budget=1.0))
    assert compressed == _by_hand(form_reader, item, query, CONFIG)


CONFIG = VLCacheConfig(budget=0.4)


def _by_hand(form_reader, item, query, config):
    """Forward, the continuation, and greedy steps on the session's own cache."""
    model, processor = form_reader
    with vl_cache(model, config) as session, torch.no_grad():
        cache = session.new_cache()
        out = model(**query.inputs, cache=cache)
        if len(query.continuation):
            out = model(input_ids=query.continuation[None], cache=cache)
        tokens = [int(out.logits[0, -1].argmax())]
        while (
            tokens[-1] != model.generation_config.eos_token_id and len(tokens) < item.max_new_tokens
        ):
            out = model(input_ids=torch.tensor([[tokens[-1]]]), cache=cache)
            tokens.append(int(out.logits[0, -1].argmax()))
    return processor.decode(tokens, skip_special_tokens=True).strip()


def test_a_prompt_without_an_image_is_refused(form_reader, value_item):
    model, processor = form_reader
    item, query = value_item
    ids = torch.tensor([[1, 40, 41, 42]])
    text = type(query)(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, query.continuation
    )
    with pytest.raises(ValueError, match="item 1 of value: got no image"):
        evaluate_item(model, processor, item, text, BUDGETS)


def test_batches_are_bounded_by_number_and_by_bytes():
    variants = [Variant(str(i), VLCacheConfig(budget=0.5)) for i in range(30)]
    assert [len(b) for b in _batches(variants, 100)] == [12, 12, 6]
    assert [v for b in _batches(variants, 100) for v in b] == variants
    assert [len(b) for b in _batches(variants, 2**30)] == [4] * 7 + [2]
    assert [len(b) for b in _batches(variants[:3], 2**40)] == [1, 1, 1]


def result_of(index):
    return {"suite": "s", "index": index, "rows": []}


def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    evaluated, advanced = [], []

    def job(index, fails=False):
        def evaluate():
            if fails:
                raise KeyboardInterrupt
            evaluated.append(index)
            return result_of(index)

        return ("s", index, evaluate)

    with pytest.raises(KeyboardInterrupt):
        run([job(0), job(1), job(2, fails=True)], path)
    with path.open("a") as file:
        file.write('{"suite": "s", "index": 2, "ro')  # the machine stopped while it was written
    results = run([job(i) for i in range(4)], path, lambda: advanced.append(1))
    assert evaluated == [0, 1, 2, 3]
    assert len(advanced) == 4
    assert results == [result_of(i) for i in range(4)] == read_results(path)
