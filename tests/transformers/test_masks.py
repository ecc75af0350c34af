"""Masks of later passes, and biases that a text model adds: never dropped without a word."""

from __future__ import annotations

import pytest
import torch
import unusual_models
from families import LONG, SHORT

from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.attention import vlcache_attention
from vlcache_triton.integrations.transformers.names import CACHE

REFUSED = (NotImplementedError, ValueError)
TURN = torch.tensor([[30, 31, 32, 33, 34]])
some_families = pytest.mark.parametrize("family", ["llava", "mistral3"], indirect=True)


def full_mask(inputs, num_new):
    mask = inputs["attention_mask"]
    return torch.cat([mask, mask.new_ones(len(mask), num_new)], 1)


def a_hole(mask):
    mask[:, -3] = 0
    return mask


def a_hole_in_the_prompt(mask):
    mask[:, 6] = 0
    return mask


def right_pads(mask):
    mask[:, -1] = 0
    return mask


def too_short(mask):
    return mask[:, -5:]


def four_dimensions(mask):
    width = mask.shape[1]
    return torch.ones(width, width, dtype=torch.bool).tril()[None, None, -5:]


BAD = [a_hole_in_the_prompt, right_pads, too_short, four_dimensions]


@some_families
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("spoil", BAD)
@torch.no_grad()
def test_a_mask_that_hides_what_is_compressed(family, spoil, cuda_graph):
    """It is refused before any layer runs, and the cache goes on as if nothing had been."""
    inputs = family.inputs(LONG)
    mask = full_mask(inputs, TURN.shape[1])
    with vl_cache(family.model, budget=0.4, cuda_graph=cuda_graph) as session:
        logits = []
        for bad in (False, True):
            cache = session.new_cache(max_new_tokens=16)
            family.model(**inputs, **{CACHE: cache})
            if bad:
                with pytest.raises(REFUSED, match="attention_mask"):
                    family.model(
                        input_ids=TURN, attention_mask=spoil(mask.clone()), **{CACHE: cache}
                    )
            out = family.model(input_ids=TURN, attention_mask=mask, **{CACHE: cache})
            logits.append(out.logits)
    assert torch.equal(*logits)


@some_families
@torch.no_grad()
def test_other_pads_than_the_prompts(family):
    inputs = family.inputs(LONG, SHORT)
    mask = full_mask(inputs, TURN.shape[1])
    with vl_cache(family.model, budget=0.4) as session:
        cache = session.new_cache(max_new_tokens=16)
        family.model(**inputs, **{CACHE: cache})
        turn = dict(input_ids=TURN.expand(2, -1), **{CACHE: cache})
        with pytest.raises(REFUSED, match=r"attention_mask: got .* left pads"):
            family.model(**turn, attention_mask=mask.flip(0))
        family.model(**turn, attention_mask=mask)


def test_a_hole_in_the_second_turn_of_generate(family):
    """Each token's mask is the turn's and ones: one look is enough, and needed."""
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4) as session:
        first = family.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        ids = torch.cat([first, TURN], 1)
        again = dict(input_ids=ids, max_new_tokens=4, do_sample=False, **{CACHE: session.cache})
        mask = torch.ones_like(ids)
        with pytest.raises(REFUSED, match="attention_mask"):
            family.model.generate(**again, attention_mask=a_hole_in_the_prompt(mask.clone()))
        family.model.generate(**again, attention_mask=mask)


@pytest.mark.parametrize("family", ["llava", "gemma3"], indirect=True)
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("width", [5, 40])
@torch.no_grad()
def test_a_hole_among_the_rows_of_a_turn(family, cuda_graph, width):
    """It is nowhere; the pass is as one without that row, but for positions."""
    inputs = family.inputs(LONG, SHORT)
    ids = torch.arange(30, 30 + width).repeat(2, 1)
    mask = full_mask(inputs, width)
    mask[0, -4:-2] = mask[1, -3] = 0
    positions = (mask.cumsum(1) - 1)[:, -width:]
    real = mask[:, -width:] == 1
    with vl_cache(family.model, budget=0.4, cuda_graph=cuda_graph) as session:
        cache = session.new_cache(max_new_tokens=4)
        family.model(**inputs, **{CACHE: cache})
        turn = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
        out = family.model(**turn, **{CACHE: cache}).logits
        step = dict(input_ids=torch.tensor([[7], [7]]), position_ids=positions[:, -1:] + 1)
        then = family.model(**step, **{CACHE: cache}).logits
        for seq in range(2):
            cache = session.new_cache(max_new_tokens=4)
            family.model(**inputs, **{CACHE: cache})
            cache.batch_select_indices(torch.tensor([seq]))
            own = dict(input_ids=ids[seq : seq + 1, real[seq]])
            own["position_ids"] = positions[seq : seq + 1, real[seq]]
            outs = family.model(**own, **{CACHE: cache}).logits
            torch.testing.assert_close(out[seq, real[seq]], outs[0], atol=1e-5, rtol=0)
            own = {name: x[seq : seq + 1] for name, x in step.items()}
            outs = family.model(**own, **{CACHE: cache}).logits
            torch.testing.assert_close(then[seq], outs[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_later_mask_on_a_whole_cache_is_applied(family):
    """Of a prompt that is left whole, nothing is lost: the mask does what it does elsewhere."""
    inputs = family.inputs(LONG)
    mask = a_hole(full_mask(inputs, TURN.shape[1]))
    turn = dict(input_ids=TURN, attention_mask=mask)
    expected = family.model(**turn, **{CACHE: family.model(**inputs)[CACHE]}).logits
    with vl_cache(family.model, budget=1.0):
        out = family.model(**turn, **{CACHE: family.model(**inputs)[CACHE]}).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_bias_of_the_text_model(cuda_graph):
    family = unusual_models.llava_on_doge()
    inputs = family.inputs(LONG)
    arguments = dict(max_new_tokens=4, do_sample=False)
    with vl_cache(family.model, budget=0.4, cuda_graph=cuda_graph) as session:
        with pytest.raises(NotImplementedError, match=r"attention_mask: got .*bias"):
            family.model.generate(**inputs, **arguments)
        assert session.report() is None
    expected = family.model.generate(**inputs, **arguments)
    with vl_cache(family.model, budget=1.0):
        assert torch.equal(family.model.generate(**inputs, **arguments), expected)


NEW_KEYWORDS = {
    "position_bias": torch.zeros(1, 2, 5, 5),  # T5's
    "indices": torch.zeros(1, 5, 2),  # of sparse attention
    "sinks": torch.zeros(1, 2, 5, 1),  # of each token, as Inkling2's
    "cu_seq_lens_q": torch.tensor([0, 2, 5]),  # of packed prompts
    "is_causal": False,
    "s_aux": torch.zeros(2, 5),
}


@pytest.mark.parametrize("name", NEW_KEYWORDS)
def test_what_attention_would_ignore_is_refused_by_name(name):
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match=rf"\b{name}\b.*expected"):
        vlcache_attention(torch.nn.Module(), q, k, v, None, **{name: NEW_KEYWORDS[name]})
    vlcache_attention(torch.nn.Module(), q, k, v, None, **{name: None})


def test_sinks_that_do_not_reach_attention_are_refused():
    module = torch.nn.Module()
    module.sinks = torch.nn.Parameter(torch.zeros(2))
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match=r"sinks in Module .*expected them as its s_aux"):
        vlcache_attention(module, q, k, v, None)


def test_a_keyword_of_the_user_reaches_attention(family):
    inputs = family.inputs(LONG)
    refused = pytest.raises(NotImplementedError, match="got 'seq_idx' in the attention of")
    with vl_cache(family.model, budget=0.4), refused, torch.no_grad():
        family.model(**inputs, seq_idx=torch.zeros(1, 3))


@pytest.mark.parametrize("family", ["internvl"], indirect=True)
@pytest.mark.parametrize("name", ["image_sizes", "mm_token_type_ids", "token_type_ids"])
def test_what_is_for_the_prompt_may_reach_attention(family, name):
    """Some models hand it down unread."""
    inputs = family.inputs(LONG)
    given = {name: torch.zeros_like(inputs["input_ids"])}
    with vl_cache(family.model, budget=0.4), torch.no_grad():
        expected = family.model(**inputs).logits
        assert torch.equal(family.model(**inputs, **given).logits, expected)


def test_labels_may_reach_attention():
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    expected, _ = vlcache_attention(torch.nn.Module(), q, k, v, None)
    out, _ = vlcache_attention(torch.nn.Module(), q, k, v, None, labels=torch.zeros(1, 5))
    assert torch.equal(out, expected)
