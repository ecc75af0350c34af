"""The ragged cache against lists of rows and dense fp32 attention; where no row is, poison is."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import CPU, REFERENCE, make_prompt, segment
from torch import Tensor

from vlcache_triton.pool import ragged as ragged_module
from vlcache_triton.pool.allocator import MAX_POOLS, PoolAllocator
from vlcache_triton.pool.ragged import RaggedCache
from vlcache_triton.pool.rings import WindowRings
from vlcache_triton.pool.shape import PoolShape, RingShape
from vlcache_triton.recipe.plan import CompressionPlan
from vlcache_triton.recipe.softmax import Softmax

D, D_V = 8, 12
ATOL = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Twin:
    """A RaggedCache beside what it should hold: the rows of each (layer, segment), as tensors."""

    def __init__(
        self,
        keep: list[list[int]],
        room: int,
        num_kv_heads: int = 2,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.num_kv_heads, self.num_layers = dtype, num_kv_heads, len(keep)
        counts = self._head_keep(keep)
        self.ragged = RaggedCache(
            PoolShape(
                capacity=int(counts.sum()) + room * counts.numel(),
                max_seqlen_k=int(counts.max()) + room,
                num_layers=self.num_layers,
                num_seqs=counts.shape[1],
                num_kv_heads=num_kv_heads,
                head_size=D,
                v_head_size=D_V,
                dtype=dtype,
                device=CPU,
            ),
            REFERENCE,
        )
        self.fill(keep, room)
        self.poison()

    def _head_keep(self, keep: list[list[int]]) -> Tensor:
        """`[num_layers, num_seqs, num_kv_heads]`: head h keeps h tokens more than keep says."""
        return torch.tensor(keep)[..., None] + torch.arange(self.num_kv_heads)

    def fill(self, keep: list[list[int]], room: int) -> None:
        """Lay a plan out that keeps every second row of each sequence."""
        counts = self._head_keep(keep)
        lengths = counts.amax((0, 2)) * 2
        prompt = make_prompt(lengths.tolist(), [1] * len(lengths))
        indices = torch.cat([torch.arange(n) * 2 for n in counts.flatten().tolist()]).int()
        cu_kept = torch.cat([torch.zeros(1), counts.flatten().cumsum(0)]).int()
        unmeasured = torch.zeros(counts.shape[:2], dtype=torch.float64)
        plan = CompressionPlan(prompt, unmeasured, counts, indices, cu_kept)
        self.ragged.lay_out(plan, room)
        self.rows: list[list[tuple[Tensor, Tensor]]] = []
        rows = len(lengths) * prompt.padded_length
        starts = prompt.starts(CPU)
        for layer in range(self.num_layers):
            k, v = self.draw(rows, self.num_kv_heads, D), self.draw(rows, self.num_kv_heads, D_V)
            self.ragged.compact_layer(
                layer, k, v, starts, indices, plan.layer_cu_kept(layer), int(counts[layer].max())
            )
            kept = []
            for s, n in enumerate(counts[layer].flatten().tolist()):
                seq, head = divmod(s, self.num_kv_heads)
                source = int(starts[seq]) + torch.arange(n) * 2
                kept.append((k[source, head], v[source, head]))
            self.rows.append(kept)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def poison(self) -> None:
        """NaN in every row of the pools that is not live."""
        live = torch.zeros(len(self.ragged.k), dtype=torch.bool)
        starts = self.ragged.cu_seqlens_k[:, :-1].flatten().tolist()
        for start, n in zip(starts, self.ragged.seqused_k.flatten().tolist(), strict=True):
            assert not live[start : start + n].any(), "segments overlap"
            live[start : start + n] = True
        self.ragged.k[~live] = math.nan
        self.ragged.v[~live] = math.nan

    def append(self, n: int) -> None:
        """A step of n rows in every layer, as the adapter does it."""
        num_seqs = self.ragged.num_seqs
        for layer in range(self.num_layers):
            k = self.draw(num_seqs, self.num_kv_heads, n, D)
            v = self.draw(num_seqs, self.num_kv_heads, n, D_V)
            self.ragged.append(layer, k, v)
            flat = zip(self.rows[layer], k.flatten(0, 1), v.flatten(0, 1), strict=True)
            self.rows[layer] = [
                (torch.cat([old_k, new_k]), torch.cat([old_v, new_v]))
                for (old_k, old_v), new_k, new_v in flat
            ]
        self.ragged.room -= n

    def select(self, index: list[int]) -> None:
        self.ragged.select_sequences(torch.tensor(index))
        heads = range(self.num_kv_heads)
        chosen = [i * self.num_kv_heads + h for i in index for h in heads]
        self.rows = [[row[s] for s in chosen] for row in self.rows]

    def check_rows(self) -> None:
        for layer, row in enumerate(self.rows):
            for s, (k, v) in enumerate(row):
                live_k, live_v = segment(self.ragged, layer, *divmod(s, self.num_kv_heads))
                assert torch.equal(live_k, k) and torch.equal(live_v, v)

    def check_attention(self, n: int, group: int = 2) -> None:
        """Each of the last n rows sees all rows up to its own, and nothing else."""
        num_seqs = self.ragged.num_seqs
        num_heads = self.num_kv_heads * group
        for layer in range(self.num_layers):
            q = self.draw(num_seqs, num_heads, n, D)
            out = self.ragged.attend(layer, q, Softmax(0.3))
            assert out.shape == (num_seqs, n, num_heads, D_V) and out.dtype == self.dtype
            for seq in range(num_seqs):
                for head in range(num_heads):
                    k, v = self.rows[layer][seq * self.num_kv_heads + head // group]
                    expected = dense_attention(q[seq, head], k, v, 0.3)
                    got = out[seq, :, head].float()
                    torch.testing.assert_close(got, expected, atol=ATOL[self.dtype], rtol=0)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Row i of q `[n, d]` sees the first len(k) - n + i + 1 rows; fp32."""
    logits = q.float() @ k.float().T * scale
    hidden = torch.arange(len(k)) > torch.arange(len(k) - len(q), len(k))[:, None]
    return logits.masked_fill(hidden, -math.inf).softmax(-1) @ v.float()


KEEP = [[5, 2], [1, 7], [3, 3]]


@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 16, 17, 40])
def test_rows_are_appended_and_attended_to(n, dtype):
    twin = Twin(KEEP, room=80, dtype=dtype)
    for _ in range(2):
        twin.append(n)
        twin.check_rows()
        twin.check_attention(n)


@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
@pytest.mark.parametrize("n", [1, 3, 20])
def test_heads_and_groups(num_kv_heads, group, n):
    twin = Twin([[4, 1, 6]], room=20, num_kv_heads=num_kv_heads)
    twin.append(n)
    twin.check_attention(n, group)


@pytest.mark.parametrize("n", [255, 256, 257, 600])
def test_a_long_turn_is_taken_in_parts(n):
    assert ragged_module.ROWS_AT_ONCE == 256
    twin = Twin([[5, 9]], room=n, num_kv_heads=1)
    twin.append(n)
    twin.check_attention(n)


def test_a_turn_behind_an_answer():
    twin = Twin(KEEP, room=64)
    for n in (1, 1, 1, 30, 1, 5):
        twin.append(n)
        twin.poison()
        twin.check_attention(n)
    twin.check_rows()


def test_growth_keeps_what_is_there_and_says_so():
    twin = Twin(KEEP, room=2)
    ragged = twin.ragged
    pool = ragged.k
    assert not ragged.reserve(2) and ragged.k is pool and ragged.room == 2
    twin.append(2)
    twin.check_rows()
    assert ragged.reserve(1) and ragged.k is not pool
    assert ragged.room >= ragged_module.GROWTH
    assert ragged.max_seqlen_k >= int(ragged.seqused_k.max()) + ragged.room
    twin.check_rows()
    twin.poison()
    twin.append(1)
    twin.check_rows()
    twin.check_attention(1)


@pytest.mark.parametrize("n", [1, 500])
def test_growth_makes_room_for_all_that_is_asked(n):
    twin = Twin(KEEP, room=3)
    twin.ragged.reserve(n)
    assert twin.ragged.room >= n
    twin.poison()
    twin.append(n)
    twin.check_rows()
    twin.check_attention(n, group=1)


def test_growth_is_by_a_quarter_at_least():
    """So that a long answer copies its cache a few times, not at every step."""
    twin = Twin([[2000]], room=1, num_kv_heads=1)
    assert twin.ragged.reserve(2)
    assert twin.ragged.room >= 2000 // 4


@pytest.mark.parametrize("index", [[1, 0], [0, 0], [1], [2, 1, 1, 0, 2]])
def test_sequences_are_reordered_repeated_and_dropped(index):
    twin = Twin([[5, 2, 3], [1, 7, 2]], room=20)
    twin.append(1)
    twin.select(index)
    assert twin.ragged.num_seqs == len(index)
    twin.check_rows()
    twin.poison()
    twin.append(1)
    twin.check_rows()
    twin.check_attention(1)
    twin.append(18)
    twin.check_attention(18)


def test_copies_of_a_sequence_go_separate_ways():
    twin = Twin([[5, 2]], room=4)
    twin.select([1, 1])
    twin.append(1)  # other rows for each
    one, other = (segment(twin.ragged, 0, seq, 0)[0] for seq in range(2))
    assert torch.equal(one[:-1], other[:-1]) and not torch.equal(one[-1], other[-1])


def test_segments_that_keep_nothing():
    twin = Twin([[0, 3], [2, 0]], room=24)
    twin.check_rows()
    twin.append(1)
    twin.check_attention(1)
    assert twin.ragged.reserve(40)
    twin.poison()
    twin.append(20)
    twin.check_rows()
    twin.check_attention(20)


def lent(ragged):
    """As `copy` into memory that is larger than need be."""

    def allocate(shape, backend):
        capacity, longest = shape.capacity + 7, shape.max_seqlen_k + 5
        larger = dataclasses.replace(shape, capacity=capacity, max_seqlen_k=longest)
        return RaggedCache(larger, backend)

    return ragged.copy(allocate)


WAYS = {
    "copied": copy.deepcopy,
    "pickled": lambda ragged: pickle.loads(pickle.dumps(ragged)),
    "lent": lent,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("keep", [KEEP, [[0, 3], [2, 0]]], ids=str)
@pytest.mark.parametrize("room", [0, 24])
def test_copies_hold_the_same_and_share_nothing(way, keep, room):
    twin = Twin(keep, room, num_kv_heads=1)
    first, twin.ragged = twin.ragged, way(twin.ragged)
    rows = [list(row) for row in twin.rows]
    twin.check_rows()
    twin.poison()
    twin.ragged.reserve(1)
    twin.append(1)
    twin.check_rows()
    twin.check_attention(1)
    twin.ragged, twin.rows = first, rows
    twin.check_rows()


def test_a_pickle_has_no_row_that_is_not_live():
    sizes = [len(pickle.dumps(Twin(KEEP, room).ragged)) for room in (0, 500)]
    assert abs(sizes[1] - sizes[0]) < 100
    state = Twin(KEEP, room=9).ragged.__getstate__()  # NaN in its head room
    assert not state["k"].isnan().any() and not state["v"].isnan().any()


@pytest.mark.parametrize("then", ["grow", "select", "pickle"])
def test_rows_without_room_are_lost_and_told(then):
    """Before there is more of it, with which the lengths would no longer tell."""
    twin = Twin(KEEP, room=2)
    twin.append(2)
    twin.ragged.check_room()
    twin.append(3)
    told = (
        rf"^VLCache: got {3 * twin.ragged.seqused_k.numel()} rows of new tokens that found no room"
    )
    with pytest.raises(RuntimeError, match=told):
        twin.ragged.check_room()
    with pytest.raises(RuntimeError, match=told):
        if then == "grow":
            twin.ragged.reserve(1)
        elif then == "select":
            twin.select([0])
        else:
            pickle.dumps(twin.ragged)


STEPS = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 1, 1, 2, 5, 16, 17, 30])),
    st.tuples(st.just("reserve"), st.sampled_from([1, 4, 200])),
    st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
    st.tuples(st.just("duplicate"), st.sampled_from(list(WAYS))),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=1, max_size=3),
    st.integers(0, 20),
    st.lists(STEPS, min_size=1, max_size=6),
)
def test_any_course_of_events(keep, room, steps):
    twin = Twin(keep, room)
    for what, argument in steps:
        if what == "append":
            twin.ragged.reserve(argument)
            twin.poison()
            twin.append(argument)
            twin.check_attention(argument)
        elif what == "reserve":
            before = twin.ragged.room
            assert twin.ragged.reserve(argument) == (argument > before)
            assert twin.ragged.room >= argument
        elif what == "duplicate":
            before, twin.ragged = twin.ragged, WAYS[argument](twin.ragged)
            assert twin.ragged.room == before.room
        else:
            twin.select([i % twin.ragged.num_seqs for i in argument])
        twin.check_rows()


def test_a_new_plan_leaves_every_tensor_where_it_is():
    """Captured graphs read these tensors."""
    twin = Twin(KEEP, room=10)
    ragged = twin.ragged
    names = ("k", "v", "cu_seqlens_k", "seqused_k")
    before = [getattr(ragged, name).data_ptr() for name in names]
    twin.append(3)
    twin.fill([[2, 1], [4, 4], [1, 3]], 9)
    assert [getattr(ragged, name).data_ptr() for name in names] == before
    assert ragged.room == 9
    twin.poison()
    twin.check_rows()
    twin.append(2)
    twin.check_attention(2)


def test_bytes_count_both_pools_with_their_room():
    ragged = Twin(KEEP, room=10, dtype=torch.float16).ragged
    kept = 2 * 21 + 3 * 2  # both heads, and one more for the second
    rows = kept + 10 * 3 * 4
    assert ragged.nbytes == rows * (D + D_V) * 2
    assert ragged.num_seqs == 2


ROWS = dict(
    num_seqs=2, num_kv_heads=2, head_size=D, v_head_size=D_V, dtype=torch.float32, device=CPU
)
SHAPE = PoolShape(**ROWS, capacity=64, max_seqlen_k=64, num_layers=2, has_remainder=False)
OTHER_BACKEND = REFERENCE._replace(name="other")


class Owner:
    """Anything that can be referred to weakly."""


@pytest.mark.parametrize(
    "change",
    [
        dict(capacity=128),
        dict(max_seqlen_k=65),
        dict(num_layers=3),
        dict(num_seqs=3),
        dict(num_kv_heads=4),
        dict(head_size=D + 1),
        dict(v_head_size=D),
        dict(dtype=torch.half),
        dict(device=torch.device("meta")),
        dict(backend=OTHER_BACKEND),
        dict(has_remainder=True),
        dict(is_fp8=True),
    ],
    ids=lambda change: "-".join(change),
)
def test_a_cache_fits_only_what_it_was_made_for(change):
    backend = change.pop("backend", REFERENCE)
    other = dataclasses.replace(SHAPE, **change)
    assert RaggedCache(SHAPE, REFERENCE).shape == SHAPE
    assert RaggedCache(other, REFERENCE).shape == other
    allocator, owner = PoolAllocator(), Owner()
    first = allocator.allocate(SHAPE, REFERENCE, owner)
    owner = Owner()
    assert allocator.allocate(SHAPE, REFERENCE, owner) is first
    owner = Owner()
    assert allocator.allocate(other, backend, owner) is not first


def test_what_is_lent_is_lent_to_nobody_else():
    allocator, owners = PoolAllocator(), [Owner() for _ in range(MAX_POOLS + 2)]
    lent = [allocator.allocate(SHAPE, REFERENCE, owner) for owner in owners]
    assert len({ragged.k.data_ptr() for ragged in lent}) == len(owners)
    del owners[1]
    assert allocator.allocate(SHAPE, REFERENCE, owners[0]) is lent[1]


def test_what_goes_with_a_cache_is_lent_along():
    """Made where it is new or of another shape; the ragged cache stays the same."""
    ring = RingShape(**ROWS, num_layers=1, window=4, is_chunked=False)
    allocator, owner = PoolAllocator(), Owner()
    first = allocator.allocate(SHAPE, REFERENCE, owner)
    rings = allocator.attach(WindowRings, ring, owner)
    owner = Owner()
    assert allocator.allocate(SHAPE, REFERENCE, owner) is first
    assert allocator.attach(WindowRings, ring, owner) is rings
    wider = dataclasses.replace(ring, window=5)
    assert allocator.attach(WindowRings, wider, owner) is not rings
    assert allocator.attach(WindowRings, wider, owner).shape == wider


def test_more_rows_than_int32_can_count_are_refused():
    meta = torch.device("meta")
    with pytest.raises(ValueError, match=f"^capacity: got {2**31} rows"):
        RaggedCache(dataclasses.replace(SHAPE, capacity=2**31, device=meta), REFERENCE)
    most = dataclasses.replace(SHAPE, capacity=2**31 - 1, device=meta)
    assert len(RaggedCache(most, REFERENCE).k) == 2**31 - 1
