"""The host's table of prompts, and the packed layout that decoding reads, without an engine."""

import math
from types import SimpleNamespace

import pytest
import torch
from fake_requests import FakeAllocator, FakePool, fake_item, fake_request
from torch.utils._python_dispatch import TorchDispatchMode

from vlcache_triton.integrations.sglang.block_table import (
    DecodeStep,
    Overflow,
    PackedLayout,
    fill_block_table,
)
from vlcache_triton.integrations.sglang.measure import (
    ending_prompts,
    plan_measurement,
    plan_prompts,
)
from vlcache_triton.integrations.sglang.packing import pack_prompts
from vlcache_triton.integrations.sglang.prompts import (
    ChunkStats,
    PromptTable,
    TrackedPrompt,
    image_end,
    slots_needed,
)
from vlcache_triton.integrations.sglang.ranks import Ranks
from vlcache_triton.ops import get_backend
from vlcache_triton.recipe.config import VLCacheConfig
from vlcache_triton.recipe.profile import HeadHits

CPU = torch.device("cpu")
LAYERS, HEADS, KV_HEADS, D = 3, 4, 2, 16
WIDTH = 96  # of req_to_token
CONFIG = VLCacheConfig(budget=0.3)
TUNED = VLCacheConfig.tuned(0.3)  # with a row for what is evicted
PROFILE = HeadHits([[9.0, 1, 0, 0], [1, 0, 0, 1], [2, 2, 1, 0]], window=2)
SKEWED = VLCacheConfig(budget=0.36, remainder="mean", min_layer_budget=0.0)


class Server:
    """A pool, its requests and the adapter's state, as the backend holds them."""

    def __init__(
        self, kernels: str = "reference", config: VLCacheConfig = CONFIG, profile=None
    ) -> None:
        self.ops, self.config, self.profile = get_backend(kernels, CPU), config, profile
        self.table = PromptTable(config, LAYERS)
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

    def prefill(self, reqs, spans) -> tuple | None:
        """One forward over positions [first, last) of each request; (prompts that end, plan)."""
        for req in reqs:
            self.table.see(req)
        parts = [(r.rid, a, b - a) for r, (a, b) in zip(reqs, spans, strict=True)]
        measured = plan_measurement(self.table, parts, self.req_to_token)
        for layer in range(LAYERS if measured is not None else 0):
            rows = [
                self.q[layer, req.kv.req_pool_idx, a:b]
                for req, (a, b) in zip(reqs, spans, strict=True)
            ]
            k = self.pool.k_buffer[layer][:, None]
            measured.add_layer(layer, LAYERS, torch.cat(rows), k, 0.25, self.config, self.ops)
        ending = ending_prompts(self.table, parts)
        if not ending:
            return None
        return ending, plan_prompts(ending, self.config, Ranks(), self.ops, self.profile)

    def pack(self, prompts, plan) -> None:
        pack_prompts(prompts, plan, self.pool, self.req_to_token, self.layout, self.ops)

    def cache(self, req, layer: int, tokens: int) -> torch.Tensor:
        """K and V `[2, tokens, kv_heads, d]` of a request that is not packed."""
        row = self.req_to_token[req.kv.req_pool_idx, :tokens].long()
        return torch.stack([self.pool.k_buffer[layer][row], self.pool.v_buffer[layer][row]])


def attention(q: torch.Tensor, kv: list[torch.Tensor], bias: list[float]) -> torch.Tensor:
    """q `[heads, d]` over each KV head's own K and V `[2, n, d]`, whose first logit has a bias."""
    group = len(q) // len(kv)
    rows = []
    for head, (k, v) in enumerate(kv):
        logits = q[head * group : (head + 1) * group] @ k.T * 0.25
        logits[:, 0] += bias[head]
        rows.append(logits.softmax(-1) @ v)
    return torch.cat(rows)


def kept_then_generated(
    plan, seq: int, dense: torch.Tensor, layer: int, length: int
) -> tuple[list[torch.Tensor], list[float]]:
    """Each KV head's `[2, n, d]`: the mean of what the plan evicts of prompt `seq`, if it says so,
    what it keeps, and all that follows; and the logarithm of how many the mean is of, else 0."""
    kv, bias = [], []
    for head, kept in enumerate(plan.kept_positions(layer, seq).long()):
        is_evicted = torch.ones(length, dtype=torch.bool)
        is_evicted[kept] = False
        rows = dense[:, :, head]
        parts = [rows[:, kept], rows[:, length:]]
        bias.append(0.0)
        if plan.evicted is not None and (count := int(plan.evicted[layer, seq, head])):
            assert count == is_evicted.sum()
            parts.insert(0, rows[:, :length][:, is_evicted].mean(1, keepdim=True))
            bias[-1] = math.log(count)
        kv.append(torch.cat(parts, 1))
    return kv, bias


@pytest.mark.parametrize("config", [CONFIG, TUNED])
@pytest.mark.parametrize("bounds", [(50,), (7, 50), (20, 31, 44, 50), (46, 47, 49, 50)])
def test_chunks_of_any_size_give_the_unchunked_plan(bounds, config):
    req = fake_request("a", 1, 50, (5, 30))
    whole, chunked = Server(config=config), Server(config=config)
    plans = []
    for server, ends in ((whole, (50,)), (chunked, bounds)):
        server.admit(req, 60)
        chunks = zip((0, *ends), ends, strict=False)
        plans += [found[1] for chunk in chunks if (found := server.prefill([req], [chunk]))]
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
        assert [bool(plans) for plans in found] == [False] * (len(ends) - 1) + [True]
        plans.append(found[-1][1])
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
    prompts, plan = together.prefill(reqs, [(0, 50), (0, 20), (4, 40)])
    singles = [alone.prefill(reqs[:1], [(0, 50)]), alone.prefill(reqs[2:], [(4, 40)])]
    assert [p.rid for p in prompts] == [p.rid for [p], _ in singles] == ["a", "b"]
    for i, (_, single) in enumerate(singles):
        assert torch.equal(plan.keep[:, i], single.keep[:, 0])
        for layer in range(LAYERS):
            ours, its = plan.kept_positions(layer, i), single.kept_positions(layer, 0)
            assert torch.equal(ours, its)


@pytest.mark.parametrize(
    ("config", "profile"),
    [
        (CONFIG, None),
        (TUNED, None),
        (VLCacheConfig.tuned(0.3, granularity="kv_head"), None),
        (SKEWED, None),
        (TUNED, PROFILE),
        (VLCacheConfig(budget=1.0, max_cache_tokens=20), None),
    ],
)
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_decoding_over_packed_prompts_reads_what_was_kept(kernels, config, profile):
    """A packed prompt, a text prompt, and a packed one whose first tokens the tree owns."""
    server = Server(kernels, config, profile)
    if config == SKEWED:  # one layer keeps a single token, another all: they have no such row
        server.q *= torch.tensor([400, 8, 0]).view(-1, 1, 1, 1, 1)
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
    prompts, plan = server.prefill(reqs, [(0, 50), (0, 20), (4, 40)])
    server.pack(prompts, plan)
    packed = [prompt.rid for prompt in prompts]
    assert packed == ["a", "b"]
    assert plan.keep[:, 0].unique().numel() > 1, "layers should differ, or packing is not tested"
    if profile is not None:
        wanted = [profile.layers(round(0.3 * LAYERS * n), n) for n in (50, 40)]
        assert torch.equal(plan.keep, torch.stack(wanted, 1))
    if config == SKEWED:
        assert (
            plan.keep[:, 0].tolist() == [1, 3, 50] and (plan.evicted > 0).any(2).sum(0).eq(1).all()
        )
    for req in (reqs[0], reqs[2]):  # give the rest away, and overwrite it
        server.table.free_evicted(req, server.req_to_token, server.allocator)
    free = server.allocator.is_free.nonzero().flatten()
    for buffer in (*server.pool.k_buffer, *server.pool.v_buffer):
        buffer[free] = float("nan")

    indices = torch.tensor([req.kv.req_pool_idx for req in reqs])
    step = DecodeStep.empty(3, WIDTH, 0 if config.remainder == "none" else KV_HEADS, CPU)
    flat, rows = server.pool.flat[:, None], server.pool.num_rows
    for layer in range(LAYERS):
        q = torch.randn(3, HEADS, D, generator=server.generator)
        fill_block_table(layer, server.req_to_token, indices, lengths, server.layout, rows, step)
        out = server.ops.varlen_decode(
            q,
            flat[:-rows],
            flat[rows:],
            step.cu_seqlens,
            step.cu_seqlens,
            1,
            WIDTH,
            softmax_scale=0.25,
            seqused_k=step.seqused_k,
            block_table=step.block_table,
            first_key_bias=step.first_key_bias,
        )
        for i, req in enumerate(reqs):
            kv = dense[layer, req.rid]
            if req.rid in packed:
                seq, length = packed.index(req.rid), len(req.origin_input_ids)
                expected = kept_then_generated(plan, seq, kv, layer, length)
            else:
                expected = [kv[:, :, head] for head in range(KV_HEADS)], [0.0] * KV_HEADS
            torch.testing.assert_close(out[i], attention(q[i], *expected), rtol=1e-4, atol=1e-5)
    # A graph's padding row may name a packed request, with a length of 1.
    fill_block_table(
        0,
        server.req_to_token,
        indices[:1],
        torch.ones(1, dtype=torch.int64),
        server.layout,
        rows,
        step.first(1, WIDTH),
    )
    assert step.seqused_k[0] == 0


class CountOps(TorchDispatchMode):
    """Counts torch's operators; the kernels', which loop here, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.in_kernel = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self.in_kernel
        return func(*args, **(kwargs or {}))

    def leave_out(self, kernel):
        def run(*args, **kwargs):
            self.in_kernel = True
            try:
                return kernel(*args, **kwargs)
            finally:
                self.in_kernel = False

        return run


def ops_of_planning_and_packing(num_layers: int, num_prompts: int) -> int:
    generator = torch.Generator().manual_seed(0)
    pool, length = FakePool(num_layers, 100 * num_prompts, KV_HEADS, D), 60
    prompts = []
    for row in range(num_prompts):
        stats = ChunkStats(
            torch.rand(num_layers, KV_HEADS, length, generator=generator),
            torch.randint(1, 200, (num_layers, HEADS), generator=generator),
        )
        prompts.append(TrackedPrompt(str(row), row, length, length - 9, 18, stats=stats))
    req_to_token = torch.arange(1, 80 * num_prompts + 1).view(num_prompts, -1)[:, :length].int()
    mode, ops = CountOps(), get_backend("reference", CPU)
    ops = ops._replace(
        **{name: mode.leave_out(getattr(ops, name)) for name in ("select_tokens", "compact_kv")}
    )
    layout = PackedLayout.empty(num_layers, num_prompts, CPU)
    with mode:
        plan = plan_prompts(prompts, CONFIG, Ranks(), ops)
        pack_prompts(prompts, plan, pool, req_to_token, layout, ops)
    return mode.count


def test_what_ends_a_prefill_costs_no_more_for_more_layers_or_prompts():
    """One prompt of 28 layers took 1003 operators when every layer had some of its own."""
    few = ops_of_planning_and_packing(3, 1)
    assert few < 200
    assert abs(ops_of_planning_and_packing(28, 1) - few) < 10
    assert abs(ops_of_planning_and_packing(28, 4) - few) < 20


def test_slots_are_freed_once_and_given_back_once():
    server = Server()
    req = fake_request("a", 1, 50, (5, 30), protected=4)
    server.admit(req, 53)
    before = int(server.allocator.is_free.sum())
    row = server.req_to_token[1].clone()
    prompts, plan = server.prefill([req], [(4, 50)])
    assert server.table.private_tokens(req.kv) == 0
    server.pack(prompts, plan)
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
    assert not server.prefill([req], [(0, 40)])
    before = server.allocator.is_free.clone()
    server.table.free_evicted(req, server.req_to_token, server.allocator)
    server.table.release(req, server.allocator)
    assert torch.equal(before, server.allocator.is_free) and len(server.table) == 0


def test_what_is_left_whole_is_not_tracked():
    server = Server()
    whole = [
        fake_request("text", 1, 50, None),
        fake_request("session", 2, 50, (5, 30)),
        fake_request("scored", 3, 50, (5, 30), max_new_tokens=1),
        fake_request("embedded", 4, 50, (5, 30), max_new_tokens=0),
        fake_request("heard", 5, 50, (5, 30), audio=True),
    ]
    whole[1].session = SimpleNamespace()
    for req in whole:
        server.table.see(req)
        assert server.table.longest_prefix(req) is None, req.rid
        assert not req.skip_radix_cache_insert, "its prefix may be reused"
    assert len(server.table) == 0
    assert PromptTable(VLCacheConfig(budget=1.0), 2).first_query_row(whole[1]) is None


def test_the_tree_leaves_a_prompt_the_slots_that_it_keeps():
    """Or whether it is compressed would depend on what other requests left in the tree."""
    req = fake_request("a", 1, 50, (45, 48))
    assert slots_needed(50, LAYERS, CONFIG) == 15
    assert PromptTable(CONFIG, LAYERS).longest_prefix(req) == 34  # not 49, the query row
    whole = VLCacheConfig(budget=60)  # tokens: more than there are
    assert PromptTable(whole, LAYERS).longest_prefix(req) is None
    table = PromptTable(CONFIG, LAYERS)
    table.see(fake_request("b", 1, 50, (45, 48), protected=34))
    assert len(table) == 1


def test_the_host_bounds_live_lengths_and_the_fill_writes_no_more():
    server = Server("triton")
    req, text = fake_request("a", 1, 50, (5, 30)), fake_request("text", 2, 20, None)
    for r, n in ((req, 53), (text, 21)):
        server.admit(r, n)
        r.kv.kv_allocated_len = n
    prompts, plan = server.prefill([req, text], [(0, 50), (0, 20)])
    server.pack(prompts, plan)
    most = int(plan.keep[:, 0].max()) + 3
    assert [server.table.most_live(r) for r in (req, text)] == [most, 21]
    step = DecodeStep.empty(2, 4096, 0, CPU)  # far wider than any
    table = step.block_table.fill_(-7)
    rows, lengths = torch.tensor([1, 2]), torch.tensor([53, 21])
    live = []
    for layer in range(LAYERS):
        fill_block_table(layer, server.req_to_token, rows, lengths, server.layout, 400, step)
        live.append(step.seqused_k.tolist())
        assert (table != -7).sum(1).tolist() == [max(x) for x in zip(*live, strict=True)]
    assert max(n for n, _ in live) == most


def test_a_request_that_its_table_cuts_short_is_told_without_a_wait():
    """Whichever layer and request it was, and however many steps come between."""
    layout, overflow = PackedLayout.empty(2, 2, CPU), Overflow(CPU)
    slots = torch.arange(40).int().expand(2, -1).contiguous()
    rows = torch.tensor([0, 1])

    def step(width: int, *lengths: int) -> None:
        empty = DecodeStep.empty(2, width, 0, CPU)
        for layer in range(2):
            where = (slots, rows, torch.tensor(lengths), layout, 40)
            fill_block_table(layer, *where, empty, overflow)

    step(30, 30, 7)
    overflow.check()
    prompt_end, first_cell = layout.table[0], layout.table[2:]
    prompt_end[1], first_cell[2, 1] = 20, 5  # its last layer has kept 5 tokens
    step(24, 24, 40)
    with pytest.raises(RuntimeError, match=r"got a request with 25 live tokens .*VLCACHE_BUDGET=1"):
        overflow.check()
    step(40, 24, 40)
    with pytest.raises(RuntimeError, match="25 live tokens"):
        overflow.check()


def test_long_requests_get_their_whole_table():
    """Longer than what a request's programs write in one go."""
    slots = torch.randperm(9000, generator=torch.Generator().manual_seed(0)).int()
    layout, step = PackedLayout.empty(1, 1, CPU), DecodeStep.empty(1, 9000, 0, CPU)
    table = step.block_table.fill_(-7)
    row = torch.zeros(1, dtype=torch.int64)
    fill_block_table(0, slots[None], row, row + 8321, layout, 9000, step)
    assert torch.equal(table[0, :8321], slots[:8321]) and (table[0, 8321:] == -7).all()


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
    assert PromptTable(config, LAYERS).first_query_row(req) == first_row


def test_the_last_visual_token_is_found_in_both_of_sglangs_forms():
    items = [fake_item([(3, 6), (9, 12)]), fake_item(None), fake_item([(20, 30)], audio=True)]
    req = SimpleNamespace(multimodal_inputs=SimpleNamespace(mm_items=items))
    assert image_end(req) == 13
    llava = SimpleNamespace(mm_items=items[1:2], image_offsets=[4, 20], image_pad_len=[10, 5])
    assert image_end(SimpleNamespace(multimodal_inputs=llava)) == 25
