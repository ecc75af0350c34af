"""The host's table of prompts, and the packed layout that decoding reads, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from fake_requests import FakeAllocator, FakePool, fake_request

from vlcache_triton.backend import get_backend
from vlcache_triton.config import VLCacheConfig
from vlcache_triton.integrations.sglang.block_table import PackedLayout, fill_block_table
from vlcache_triton.integrations.sglang.index_only import KeptPositions, sparse_table
from vlcache_triton.integrations.sglang.measure import ending_prompts, plan_measurement, plan_prompt
from vlcache_triton.integrations.sglang.packing import pack_prompt
from vlcache_triton.integrations.sglang.prompts import PromptTable, image_end, slots_needed

CPU = torch.device("cpu")
LAYERS, HEADS, KV_HEADS, D = 3, 4, 2, 16
WIDTH = 96  # of req_to_token
CONFIG = VLCacheConfig(budget=0.3)


class Server:
    """A pool, its requests and the adapter's state, as the backend holds them."""

    def __init__(self, kernels: str = "reference", pack: bool = True) -> None:
        self.ops = get_backend(kernels, CPU)
        self.table = PromptTable(CONFIG, LAYERS, pack)
        self.pool = FakePool(LAYERS, 400, KV_HEADS, D)
        self.allocator = FakeAllocator(399)
        self.req_to_token = torch.zeros(8, WIDTH, dtype=torch.int32)
        self.layout = PackedLayout.empty(LAYERS, 8, CPU)
        self.generator = torch.Generator().manual_seed(1)
        # A query for every layer and position, so that chunks of a prompt agree.
        shape = LAYERS, 8, WIDTH, HEADS, D
        self.q = 3 * torch.randn(shape, generator=self.generator)

    def admit(self, req, total: int) -> None:
        """Give a request slots for `total` tokens."""
        slots = self.allocator.alloc(total, self.generator)
        self.req_to_token[req.kv.req_pool_idx, :total] = slots.int()

    def prefill(self, reqs, spans) -> list:
        """One forward over positions [first, last) of each request; returns its finished plans."""
        for req in reqs:
            self.table.see(req)
        prefix = [first for first, _ in spans]
        extend = [last - first for first, last in spans]
        rids = [req.rid for req in reqs]
        measured = plan_measurement(self.table, rids, prefix, extend, self.req_to_token)
        for layer in range(LAYERS if measured is not None else 0):
            rows = [
                self.q[layer, req.kv.req_pool_idx, a:b]
                for req, (a, b) in zip(reqs, spans, strict=True)
            ]
            k = self.pool.k_buffer[layer][:, None]
            measured.add_layer(layer, LAYERS, torch.cat(rows), k, 0.25, 0.01, self.ops)
        ending = ending_prompts(self.table, rids, prefix, extend)
        return [(p, plan_prompt(p, self.table, self.ops)) for p in ending]

    def pack(self, prompt, plan) -> None:
        slots = self.req_to_token[prompt.req_pool_idx, : prompt.length].contiguous()
        pack_prompt(prompt, plan, self.pool, slots, self.layout, self.ops)

    def cache(self, req, layer: int, tokens: int) -> torch.Tensor:
        """K and V `[2, tokens, kv_heads, d]` of a request that is not packed."""
        row = self.req_to_token[req.kv.req_pool_idx, :tokens].long()
        return torch.stack([self.pool.k_buffer[layer][row], self.pool.v_buffer[layer][row]])


def attention(q: torch.Tensor, kv: list[torch.Tensor]) -> torch.Tensor:
    """q `[heads, d]` over each KV head's own K and V `[2, n, d]`."""
    group = len(q) // len(kv)
    rows = []
    for head, (k, v) in enumerate(kv):
        weights = (q[head * group : (head + 1) * group] @ k.T * 0.25).softmax(-1)
        rows.append(weights @ v)
    return torch.cat(rows)


def kept_then_generated(plan, dense: torch.Tensor, layer: int, length: int) -> list[torch.Tensor]:
    """Each KV head's `[2, n, d]`: what the plan keeps of the prompt, and all that follows."""
    kept = plan.kept_positions(layer, 0).long()
    return [
        torch.cat([dense[:, kept[head], head], dense[:, length:, head]], 1)
        for head in range(KV_HEADS)
    ]


@pytest.mark.parametrize("bounds", [(50,), (7, 50), (20, 31, 44, 50), (46, 47, 49, 50)])
def test_chunks_of_any_size_give_the_unchunked_plan(bounds):
    req = fake_request("a", 1, 50, (5, 30))
    whole, chunked = Server(), Server()
    plans = []
    for server, ends in ((whole, (50,)), (chunked, bounds)):
        server.admit(req, 60)
        chunks = zip((0, *ends), ends, strict=False)
        plans += [plan for chunk in chunks for _, plan in server.prefill([req], [chunk])]
    assert len(plans) == 2
    assert torch.equal(plans[0].keep, plans[1].keep)
    assert torch.equal(plans[0].indices, plans[1].indices)
    torch.testing.assert_close(plans[0].sparsity, plans[1].sparsity, rtol=0, atol=0)


@pytest.mark.parametrize("bounds", [(58,), (30, 58), (30, 50, 58), (44, 53, 58)])
def test_a_retracted_request_keeps_what_it_kept_and_is_packed_at_its_very_end(bounds):
    first, again = Server(), Server()
    plans = []
    for server, req, ends in (
        (first, fake_request("a", 1, 50, (5, 30)), (50,)),
        (again, fake_request("a", 1, 50, (5, 30), outputs=8), bounds),
    ):
        server.admit(req, 60)
        found = [server.prefill([req], [chunk]) for chunk in zip((0, *ends), ends, strict=False)]
        assert [len(plans) for plans in found] == [0] * (len(ends) - 1) + [1]
        plans.append(found[-1][0][1])
    assert torch.equal(plans[0].indices, plans[1].indices)


def test_a_batch_measures_each_image_prompt_as_if_alone():
    reqs = [
        fake_request("a", 1, 50, (5, 30)),
        fake_request("text", 2, 20, None),
        fake_request("b", 3, 40, (0, 9), protected=4),
    ]
    together, alone = Server(), Server()
    for server in (together, alone):
        for req in reqs:
            server.admit(req, len(req.origin_input_ids))
    plans = together.prefill(reqs, [(0, 50), (0, 20), (4, 40)])
    singles = alone.prefill(reqs[:1], [(0, 50)]) + alone.prefill(reqs[2:], [(4, 40)])
    assert [p.rid for p, _ in plans] == [p.rid for p, _ in singles] == ["a", "b"]
    for (_, ours), (_, single) in zip(plans, singles, strict=True):
        assert torch.equal(ours.indices, single.indices)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_decoding_over_packed_prompts_reads_what_was_kept(kernels):
    """A packed prompt, a text prompt, and a packed one whose first tokens the tree owns."""
    server = Server(kernels)
    reqs = [
        fake_request("a", 1, 50, (5, 30)),
        fake_request("text", 2, 20, None),
        fake_request("b", 3, 40, (6, 19), protected=4),
    ]
    lengths = torch.tensor([53, 21, 41])  # generated tokens behind the prompts
    for req, length in zip(reqs, lengths.tolist(), strict=True):
        server.admit(req, length)
    dense = {
        (layer, req.rid): server.cache(req, layer, n)
        for layer in range(LAYERS)
        for req, n in zip(reqs, lengths.tolist(), strict=True)
    }
    plans = {p.rid: (p, plan) for p, plan in server.prefill(reqs, [(0, 50), (0, 20), (4, 40)])}
    for prompt, plan in plans.values():
        server.pack(prompt, plan)
    keep = plans["a"][1].keep.flatten()
    assert keep.unique().numel() > 1, "layers should differ, or the packing is not tested"
    for req in (reqs[0], reqs[2]):  # give the rest away, and overwrite it
        server.table.free_evicted(req, server.req_to_token, server.allocator)
    free = server.allocator.is_free.nonzero().flatten()
    for buffer in (*server.pool.k_buffer, *server.pool.v_buffer):
        buffer[free] = float("nan")

    indices = torch.tensor([req.kv.req_pool_idx for req in reqs])
    table = torch.zeros(3, WIDTH, dtype=torch.int32)
    seqused, starts = torch.zeros(3, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    flat, rows = server.pool.flat[:, None], server.pool.num_rows
    for layer in range(LAYERS):
        q = torch.randn(3, HEADS, D, generator=server.generator)
        fill_block_table(
            layer, server.req_to_token, indices, lengths, server.layout, rows, table, seqused
        )
        out = server.ops.varlen_decode(
            q,
            flat[:-rows],
            flat[rows:],
            starts,
            starts,
            1,
            WIDTH,
            softmax_scale=0.25,
            seqused_k=seqused,
            block_table=table,
        )
        for i, req in enumerate(reqs):
            kv = dense[layer, req.rid]
            if req.rid in plans:
                expected = kept_then_generated(
                    plans[req.rid][1], kv, layer, len(req.origin_input_ids)
                )
            else:
                expected = [kv[:, :, head] for head in range(KV_HEADS)]
            torch.testing.assert_close(out[i], attention(q[i], expected), rtol=1e-4, atol=1e-5)
    # A graph's padding row may name a packed request, with a length of 1.
    fill_block_table(
        0,
        server.req_to_token,
        indices[:1],
        torch.ones(1, dtype=torch.int64),
        server.layout,
        rows,
        table[:1],
        seqused[:1],
    )
    assert seqused[0] == 0


def test_index_only_tables_read_the_same_tokens():
    server = Server(pack=False)
    req, text = fake_request("a", 1, 50, (5, 30)), fake_request("text", 2, 20, None)
    for r, n in ((req, 53), (text, 21)):
        server.admit(r, n)
    [(_, plan)] = server.prefill([req, text], [(0, 50), (0, 20)])
    kept = [KeptPositions(50, plan), None]
    rows = [server.req_to_token[1], server.req_to_token[2]]
    q = torch.randn(2, HEADS, D, generator=server.generator)
    for layer in range(LAYERS):
        table, seqused = sparse_table(layer, kept, rows, [53, 21], KV_HEADS)
        starts = torch.arange(5, dtype=torch.int32)
        out = server.ops.varlen_decode(
            q.view(4, HEADS // KV_HEADS, D),
            server.pool.k_buffer[layer].reshape(-1, 1, 1, D),
            server.pool.v_buffer[layer].reshape(-1, 1, 1, D),
            starts,
            starts,
            1,
            table.shape[1],
            softmax_scale=0.25,
            seqused_k=seqused,
            block_table=table,
        ).view(2, HEADS, D)
        expected = kept_then_generated(plan, server.cache(req, layer, 53), layer, 50)
        torch.testing.assert_close(out[0], attention(q[0], expected), rtol=1e-4, atol=1e-5)
        dense = server.cache(text, layer, 21)
        expected = [dense[:, :, head] for head in range(KV_HEADS)]
        torch.testing.assert_close(out[1], attention(q[1], expected), rtol=1e-4, atol=1e-5)
    assert not req.skip_radix_cache_insert


def test_slots_are_freed_once_and_given_back_once():
    server = Server()
    req = fake_request("a", 1, 50, (5, 30), protected=4)
    server.admit(req, 53)
    before = int(server.allocator.is_free.sum())
    row = server.req_to_token[1].clone()
    [(prompt, plan)] = server.prefill([req], [(4, 50)])
    assert server.table.private_tokens(req.kv) == 0
    server.pack(prompt, plan)
    for _ in range(2):
        server.table.free_evicted(req, server.req_to_token, server.allocator)
    slots = slots_needed(50, LAYERS, CONFIG)
    assert slots == 15  # ceil(0.3 * 50)
    assert int(server.allocator.is_free.sum()) == before + 46 - slots
    assert req.kv.cache_protected_len == 50 and req.skip_radix_cache_insert
    assert server.table.private_tokens(req.kv) == slots and server.table.has_freed
    server.table.release(req, server.allocator)
    server.table.release(req, server.allocator)
    assert int(server.allocator.is_free.sum()) == before + 46
    assert not server.allocator.is_free[row[:4].long()].any(), "the tree's slots are not ours"
    assert len(server.table) == 0


def test_a_request_that_leaves_before_it_is_packed_frees_nothing_of_ours():
    server = Server()
    req = fake_request("a", 1, 50, (5, 30))
    server.admit(req, 50)
    assert server.prefill([req], [(0, 40)]) == []
    before = server.allocator.is_free.clone()
    server.table.free_evicted(req, server.req_to_token, server.allocator)
    server.table.release(req, server.allocator)
    assert torch.equal(before, server.allocator.is_free) and len(server.table) == 0


def test_what_is_left_whole_is_not_tracked():
    server = Server()
    whole = [
        fake_request("text", 1, 50, None),
        fake_request("cached", 2, 50, (5, 30), protected=40),  # fewer own slots than it keeps
        fake_request("session", 3, 50, (5, 30)),
    ]
    whole[2].session = SimpleNamespace()
    for req in whole:
        server.table.see(req)
    assert len(server.table) == 0
    assert PromptTable(VLCacheConfig(budget=1.0), 2, True).first_query_row(whole[1]) is None


@pytest.mark.parametrize(
    "config, image, first_row",
    [
        (VLCacheConfig(), (5, 30), 31),
        (VLCacheConfig(), (5, 49), 49),  # the image ends the prompt
        (VLCacheConfig(max_query_rows=4), (5, 30), 46),
        (VLCacheConfig(text_window=8), None, 42),
        (VLCacheConfig(text_window=80), None, 0),
        (VLCacheConfig(), None, None),
    ],
)
def test_query_rows_are_those_of_the_recipe(config, image, first_row):
    req = fake_request("a", 1, 50, image)
    assert PromptTable(config, LAYERS, True).first_query_row(req) == first_row


def test_the_last_visual_token_is_found_in_both_of_sglangs_forms():
    items = [SimpleNamespace(offsets=[(3, 6), (9, 12)]), SimpleNamespace(offsets=None)]
    req = SimpleNamespace(multimodal_inputs=SimpleNamespace(mm_items=items))
    assert image_end(req) == 13
    llava = SimpleNamespace(mm_items=items[1:], image_offsets=[4, 20], image_pad_len=[10, 5])
    assert image_end(SimpleNamespace(multimodal_inputs=llava)) == 25
