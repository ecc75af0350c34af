"""An fp8 pool beside one in the rows' dtype that holds the same: codes to the bit."""

import copy
import dataclasses
import pickle

import pytest
import torch
from prompts import CPU, REFERENCE, compress, make_layers, make_prompt, segment

from vlcache_triton import VLCacheConfig
from vlcache_triton.pool.compress import PromptCompressor
from vlcache_triton.pool.ragged import RaggedCache
from vlcache_triton.pool.streaming import StreamingCompressor
from vlcache_triton.recipe.softmax import Softmax
from vlcache_triton.recipe.turn import Eviction

FP8 = torch.float8_e4m3fn
PROMPT = make_prompt([40, 23], [6, 3])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
either = pytest.mark.parametrize("make", [PromptCompressor, StreamingCompressor])


def packed(make=PromptCompressor, dtype=torch.float32, remainder="none", kv_cache_dtype="auto"):
    """Of keys whose heads differ in size by thousands."""
    layers = make_layers(PROMPT, [0.3, 2.0, 8.0], d_v=12, dtype=dtype)
    sizes = torch.tensor([0.01, 30.0], dtype=dtype)[:, None]
    layers = [layer._replace(k=layer.k * sizes, q=layer.q / 30) for layer in layers]
    config = VLCacheConfig(budget=0.3, remainder=remainder, kv_cache_dtype=kv_cache_dtype)
    return compress(make(PROMPT, 3, config, REFERENCE), layers)[1]


def pair(*args, **kwargs):
    return packed(*args, **kwargs), packed(*args, **kwargs, kv_cache_dtype="fp8_e4m3")


def segments(ragged):
    for layer in range(len(ragged.seqused_k)):
        for s in range(ragged.seqused_k.shape[1]):
            yield layer, s, segment(ragged, layer, *divmod(s, ragged.num_kv_heads))


def assert_codes(fp8, plain, num_kept=None):
    """Of every live row, by the largest of the first num_kept rows that are tokens."""
    first = 0 if plain.num_evicted is None else 1
    for (layer, s, codes), (_, _, rows) in zip(segments(fp8), segments(plain), strict=True):
        for code, row, descales in zip(codes, rows, (fp8.k_descale, fp8.v_descale), strict=True):
            n = len(row) if num_kept is None else int(num_kept[layer, s])
            descale = row[first:n].float().abs().max() * (2 / 448)
            assert descales[layer, s] == descale
            expected = (row.float() / descale).clamp(-448, 448).to(FP8)
            assert torch.equal(code[first:].float(), expected[first:].float())
            # A mean is rounded from fp32 here, and from the rows' dtype there.
            atol = float(descale) * 2.0**-9
            torch.testing.assert_close(
                code[:first].float() * descale, row[:first].float(), atol=atol, rtol=2.0**-4
            )


@either
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("remainder", ["none", "mean"])
def test_codes_of_a_prompt_and_of_what_follows(make, dtype, remainder):
    plain, fp8 = pair(make, dtype, remainder)
    assert fp8.k.dtype == fp8.v.dtype == FP8 and fp8.dtype == dtype
    assert fp8.nbytes * dtype.itemsize == plain.nbytes
    assert_codes(fp8, plain)
    num_kept = plain.seqused_k.clone()
    generator = torch.Generator().manual_seed(1)
    for n in (1, 3):
        for layer in range(3):
            k = torch.randn(2, 2, n, 8, generator=generator).to(dtype) * 4  # some saturate
            v = torch.randn(2, 2, n, 12, generator=generator).to(dtype)
            for ragged in (plain, fp8):
                ragged.append(layer, k, v)
        for ragged in (plain, fp8):
            ragged.room -= n
    assert_codes(fp8, plain, num_kept)
    assert any((codes[0].float().abs() == 448).any() for _, _, codes in segments(fp8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 16, 17])
def test_what_is_read_is_code_times_scale(n, dtype):
    """By steps, and by long turns through torch."""
    fp8 = packed(dtype=dtype, kv_cache_dtype="fp8_e4m3", remainder="mean")
    fp8.reserve(n)
    generator = torch.Generator().manual_seed(2)
    draw = (torch.randn(2, h, n, d, generator=generator) for h, d in ((2, 8), (2, 12), (4, 8)))
    k, v, q = (x.to(dtype) for x in draw)
    fp8.append(1, k, v)
    plain = RaggedCache(
        dataclasses.replace(fp8.shape, is_fp8=False, dtype=torch.float32), REFERENCE
    )
    for name in ("cu_seqlens_k", "seqused_k", "num_evicted", "first_key_bias"):
        getattr(plain, name).copy_(getattr(fp8, name))
    plain.k.zero_(), plain.v.zero_()
    for layer, s, codes in segments(fp8):
        for pool, code, descale in zip(
            segment(plain, layer, *divmod(s, 2)), codes, (fp8.k_descale, fp8.v_descale), strict=True
        ):
            pool.copy_(code.float() * descale[layer, s])
    out, expected = (
        x.attend(1, query, Softmax(0.01)) for x, query in ((fp8, q), (plain, q.float()))
    )
    assert out.dtype == dtype
    atol = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(out.float(), expected, atol=atol, rtol=0)


WAYS = {
    "copied": copy.deepcopy,
    "pickled": lambda ragged: pickle.loads(pickle.dumps(ragged)),
    "grown": lambda ragged: ragged.reserve(ragged.room + 1) and ragged,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_scales_go_along(way):
    plain, fp8 = pair(remainder="mean")
    moved = way(fp8)
    assert moved.shape.is_fp8 and moved.dtype == torch.float32
    assert_codes(moved, plain)


def test_scales_go_along_with_sequences_that_are_repeated():
    plain, fp8 = pair(remainder="mean")
    for ragged in (plain, fp8):
        ragged.select_sequences(torch.tensor([1, 0, 1]))
    assert_codes(fp8, plain)


def every_second(ragged):
    """An eviction of every second token."""
    first = 0 if ragged.num_evicted is None else (ragged.num_evicted > 0).long()
    tokens = ragged.seqused_k.long() - first
    rows = first + torch.zeros_like(tokens)
    kept = [
        torch.arange(r, r + t, 2) for r, t in zip(rows.flatten(), tokens.flatten(), strict=True)
    ]
    num_kept = (tokens + 1) // 2
    evicted = tokens - num_kept if ragged.num_evicted is not None else torch.zeros_like(tokens)
    return Eviction(None, torch.cat(kept).int(), num_kept, evicted)


@pytest.mark.parametrize("remainder", ["none", "mean"])
def test_evicting_moves_codes_and_scales_as_they_are(remainder):
    fp8 = packed(remainder=remainder, kv_cache_dtype="fp8_e4m3")
    codes = [codes for _, _, codes in segments(fp8)]
    other = fp8.evict(every_second(fp8), 2)
    assert other.shape.is_fp8
    assert torch.equal(other.k_descale, fp8.k_descale)
    assert torch.equal(other.v_descale, fp8.v_descale)
    first = 0 if remainder == "none" else 1
    for (layer, s, after), before in zip(segments(other), codes, strict=True):
        for moved, code, descale in zip(after, before, (fp8.k_descale, fp8.v_descale), strict=True):
            assert torch.equal(moved[first:].float(), code[first::2].float())
            if first:
                scale, count = descale[layer, s], int(fp8.num_evicted[layer, s])
                row, gone = code[0].float() * scale, code[2::2].float() * scale
                mean = (row * count + gone.sum(0)) / (count + len(gone))
                assert int(other.num_evicted[layer, s]) == count + len(gone)
                got = moved[0].float() * scale
                torch.testing.assert_close(got, mean, atol=float(scale) * 2.0**-9, rtol=2.0**-4)


@pytest.mark.parametrize("remainder", ["none", "mean"])
def test_what_was_whole_is_rounded_when_it_is_evicted_from(remainder):
    plain = packed(remainder=remainder)
    fp8, expected = (plain.evict(every_second(plain), 2, is_fp8=x) for x in (True, False))
    assert fp8.shape.is_fp8 and not expected.shape.is_fp8
    assert_codes(fp8, expected)


def test_segments_that_keep_nothing_have_a_scale():
    """Of an eviction that takes all: what is appended is as it is."""
    fp8 = packed(kv_cache_dtype="fp8_e4m3")
    plain = packed()
    none = torch.zeros_like(plain.seqused_k.long())
    eviction = Eviction(None, torch.zeros(0, dtype=torch.int32, device=CPU), none, none)
    other = plain.evict(eviction, 4, is_fp8=True)
    assert (other.k_descale == 1).all() and (other.v_descale == 1).all()
    assert fp8.evict(eviction, 4).k_descale.equal(fp8.k_descale)
