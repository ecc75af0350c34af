"""The kernels under torch.compile: operators that torch knows the shapes and the writes of."""

import inspect
from typing import Any

import pytest
import torch
from support import Operators, assert_identical, cumulative, random_varlen, run_decode
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only

from vlcache_triton.kernels import operators, reference, remainder, types

NAMES = [name for name in operators.__all__ if inspect.isfunction(getattr(reference, name, None))]
NUM_KV_HEADS, D, D_V = 2, 16, 8


def registered(name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, operators.LIBRARY.ns), name).default


def arguments(name: str, page_size: int | None) -> tuple[tuple, dict]:
    """What an operation is called with: three sequences, one of them empty, part of their room."""
    batch = random_varlen(
        [2, 0, 1], [9, 4, 8], d=D, d_v=D_V, used=[8, 0, 7], page_size=page_size, dtype=torch.float32
    )
    k, v = (x.nan_to_num(0.5) for x in (batch.k, batch.v))
    where = {"block_table": batch.block_table}
    lengths = (batch.max_seqlen_q, batch.max_seqlen_k)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(NUM_KV_HEADS, 15, generator=generator)
    keep = torch.tensor([4, 0, 5], dtype=torch.int32)
    chosen = (scores, cumulative([8, 0, 7]), keep, keep // 2)
    sizes = {"max_seqlen": 8, "total_kept": 18}
    selection = reference.select_tokens(*chosen, **sizes)
    source = (k, v, batch.cu_seqlens_k, *selection)
    starts = cumulative([6] * 6)
    pool = (torch.zeros(36, 1, D), torch.zeros(36, 1, D_V), starts)
    if name == "post_vision_stats":
        return (batch.q, k, batch.cu_seqlens_q, batch.cu_seqlens_k, *lengths), batch.cache
    if name == "key_value_stats":
        return (k, v, batch.cu_seqlens_k, batch.max_seqlen_k), batch.cache
    if name == "select_tokens":
        return chosen, sizes
    if name == "compact_kv":
        return (*source, *pool), {"max_kept": 5, **where}
    if name == "compact_kv_":
        return source, {"max_kept": 5, **where}
    if name == "compact_layers":
        k, v = (x.reshape(-1, *x.shape[-2:]) for x in (k, v))
        layers = ([k, k + 1], [v, v + 1], batch.cu_seqlens_k)
        kept = torch.cat([selection.indices] * 2), cumulative([4, 4, 0, 0, 5, 5] * 2)
        pool = (torch.zeros(72, 1, D), torch.zeros(72, 1, D_V))
        places = torch.arange(14, dtype=torch.int32).view(2, 7) * 6
        places[1] -= 6
        return (*layers, *kept, *pool, places), {"max_kept": 5}
    if name == "kept_descales":
        kept = torch.cat([selection.indices] * 2), cumulative([4, 4, 0, 0, 5, 5] * 2)
        return ([k, k + 1], [v, v + 1], batch.cu_seqlens_k, *kept), {"max_kept": 5, **where}
    if name == "sum_evicted":
        return (*source, 9), batch.cache
    if name == "store_means":
        sums = reference.sum_evicted(*source, 9, **batch.cache)
        return (*sums, torch.full((6,), 3, dtype=torch.int32), *pool), {}
    if name == "varlen_decode":
        starts = (batch.cu_seqlens_q, batch.cu_seqlens_k)
        return (batch.q, k, v, *starts, *lengths), {"causal": True, **batch.cache}
    new = (torch.rand(3, 1, NUM_KV_HEADS, size, generator=generator) for size in (D, D_V))
    return (*new, k, v, batch.cu_seqlens_k, batch.seqused_k), where


def test_public_is_what_the_reference_has_what_it_returns_and_what_decode_is_given():
    def defined(module):
        mine = (x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__)
        return {x.__name__ for x in mine if not x.__name__.startswith("_")}

    given = {"decode_schedule", "decode_workspace"}
    assert set(operators.__all__) == defined(reference) | defined(types) | given
    assert set(NAMES) == defined(reference)


def on(device: torch.device | str, arguments: Any) -> Any:
    """The arguments on that device."""
    return tree_map_only(Tensor, lambda x: x.to(device), arguments)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """torch.compile counts what it compiled for one code object, and gives up at eight."""
    torch._dynamo.reset()


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, page_size):
    args, options = arguments(name, page_size)
    torch.library.opcheck(registered(name), args, options)


OPTIONAL = ["compact_kv", "compact_kv_", "sum_evicted", "store_means", "varlen_decode", "append_kv"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_opcheck_of_pages_without_starts(name):
    """Positional arguments that may be None, and what takes their place."""
    args, options = arguments(name, 4)
    names = list(inspect.signature(getattr(reference, name)).parameters)
    bare = [
        None if n.startswith(("cu_seqlens_k", "cu_seqlens_out")) else x
        for n, x in zip(names, args, strict=False)
    ]
    if name in ("compact_kv", "store_means"):  # whose pools are packed there
        out = [x.view(9, 4, 1, -1) for x in args[names.index("out_k") : names.index("out_k") + 2]]
        bare[names.index("out_k") : names.index("out_k") + 2] = out
        options = options | {"out_block_table": torch.arange(12, dtype=torch.int32).view(6, 2) % 9}
    torch.library.opcheck(registered(name), tuple(bare), options)


@pytest.mark.parametrize("name", ["varlen_decode", "post_vision_stats"])
def test_opcheck_with_sinks(name):
    args, options = arguments(name, 4)
    more = {"num_splits": 2} if name == "varlen_decode" else {}
    torch.library.opcheck(registered(name), args, {**options, "sinks": torch.ones(4), **more})


@pytest.mark.parametrize(
    "name", ["compact_kv", "compact_layers", "store_means", "varlen_decode", "append_kv"]
)
def test_opcheck_of_fp8(name):
    """But for the schema, whose check compares tensors as torch cannot compare fp8."""
    args, options = arguments(name, None)
    args, caches = list(args), {"varlen_decode": (1, 2), "append_kv": (2, 3), "store_means": (3, 4)}
    for i in caches.get(name, (5, 6)):
        args[i] = args[i].to(torch.float8_e4m3fn)
    shape = {"compact_layers": (2, 6, 1), "varlen_decode": (3, 2), "append_kv": (3, 2)}
    k_descale, v_descale = torch.rand(2, *shape.get(name, (6, 1)))
    options |= {"k_descale": k_descale, "v_descale": v_descale.clone()}
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(registered(name), tuple(args), options, test_utils=checks)


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_is_the_reference_s_signature(name):
    """But for what a graph has no use for: where to write, and whether to give a second result."""
    parameters = inspect.signature(getattr(reference, name)).parameters
    expected = [
        (p.name, p.kind is p.KEYWORD_ONLY, p.default)
        for p in parameters.values()
        if p.name not in ("out", "return_softmax_lse")
    ]
    found = []
    for argument in registered(name)._schema.arguments:
        default = argument.default_value if argument.has_default_value() else inspect._empty
        default = tuple(default) if isinstance(default, list) else default
        found.append((argument.name, argument.kwarg_only, default))
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_eager_calls_go_straight_to_the_kernels(name):
    operation = getattr(operators, name)
    args, options = arguments(name, None)
    with Operators() as seen:
        operation(*args, **options)
    assert not any(operators.LIBRARY.ns in x for x in map(str, seen.names))
    assert operation.__wrapped__.__module__.startswith("vlcache_triton.kernels.")
    assert inspect.signature(operation) == inspect.signature(operation.__wrapped__)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_in_one_graph_they_are_the_reference_on_the_cpu(name):
    args, options = arguments(name, page_size=4)
    expected_args, expected_options = arguments(name, page_size=4)
    compiled = torch.compile(getattr(operators, name), fullgraph=True, backend="aot_eager")
    actual = compiled(*args, **options)
    expected = getattr(reference, name)(*expected_args, **expected_options)
    assert type(actual) is type(expected)
    if expected is not None:
        as_tuple = (lambda x: x) if isinstance(expected, tuple) else (lambda x: (x,))
        assert_identical(as_tuple(actual), as_tuple(expected))
    written = [x for x in args if isinstance(x, Tensor)]
    assert_identical(written, [x for x in expected_args if isinstance(x, Tensor)])


def test_a_compiled_decode_writes_where_it_is_told():
    args, options = arguments("varlen_decode", None)
    expected, expected_lse = reference.varlen_decode(*args, return_softmax_lse=True, **options)
    compiled = torch.compile(operators.varlen_decode, fullgraph=True, backend="aot_eager")
    out = torch.full_like(expected, torch.nan)
    workspace = torch.full((1000,), torch.nan)
    more = {"out": out, "workspace": workspace, "return_softmax_lse": True}
    result, lse = compiled(*args, **options, **more)
    assert_identical([out, result, lse], [expected, expected, expected_lse])
    assert workspace.isnan().all()


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("name", NAMES)
def test_fakes_have_the_shapes_of_the_kernels(device, name, page_size):
    """opcheck holds them to the reference, which gives the sums of a segment in one piece."""
    args, options = arguments(name, page_size)
    more = {"return_softmax_lse": True} if name == "varlen_decode" else {}
    real = getattr(operators, name)(*on(device, args), **on(device, options), **more)
    fake = registered(name)(*on("meta", args), **on("meta", options))
    if real is None:
        assert fake is None
    else:
        assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


class Model(nn.Module):
    """Two layers of attention over caches of their own, and nothing that an engine would add."""

    def __init__(self, num_seqs: int, capacity: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.capacity = heads, capacity
        width = heads * D
        self.qkv = nn.ModuleList(nn.Linear(width, width + 2 * NUM_KV_HEADS * D) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        cache = torch.zeros(2, num_seqs * capacity, NUM_KV_HEADS, D)
        self.register_buffer("k", cache)
        self.register_buffer("v", cache.clone())
        self.register_buffer("used", torch.zeros(2, num_seqs, dtype=torch.int32))
        self.register_buffer("starts_q", cumulative([1] * num_seqs))
        self.register_buffer("starts_k", cumulative([capacity] * num_seqs))

    def forward(self, x: Tensor) -> Tensor:
        """One token of every sequence, `[num_seqs, width]`."""
        num_seqs = len(x)
        for i in range(2):
            q, k, v = self.qkv[i](x).split([self.heads * D, *[NUM_KV_HEADS * D] * 2], -1)
            new = (y.reshape(num_seqs, 1, NUM_KV_HEADS, D) for y in (k, v))
            cache = self.k[i], self.v[i]
            operators.append_kv(*new, *cache, self.starts_k, self.used[i])
            attended = operators.varlen_decode(
                q.reshape(num_seqs, self.heads, D),
                *cache,
                self.starts_q,
                self.starts_k,
                1,
                self.capacity,
                causal=True,
                seqused_k=self.used[i],
            )
            x = x + self.out[i](attended.reshape(num_seqs, -1))
        return x


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_model_compiles_into_one_graph_and_stays_compiled_as_its_cache_grows(backend):
    torch.manual_seed(0)
    eager = Model(num_seqs=3, capacity=8)
    compiled = Model(num_seqs=3, capacity=8)
    compiled.load_state_dict(eager.state_dict())
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(compiled, fullgraph=True, backend=counter)
    with torch.inference_mode():
        for token in torch.randn(4, 3, 4 * D):
            torch.testing.assert_close(step(token), eager(token), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    assert_identical([compiled.used], [eager.used])
    torch.testing.assert_close(compiled.k, eager.k)


def test_shapes_may_change():
    """A number of sequences that torch.compile takes for dynamic is one graph for all."""
    counter = CompileCounterWithBackend("aot_eager")
    decode = torch.compile(operators.varlen_decode, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([5, 9], [1, 2, 3, 4], [7] * 3):
        batch = random_varlen([1] * len(lengths), lengths, d=D, dtype=torch.float32)
        expected = run_decode(reference.varlen_decode, batch)
        assert_identical(run_decode(decode, batch), expected)
    assert counter.frame_count <= 2


def test_sums_come_in_chunks_on_a_gpu():
    assert remainder.num_chunks(0) == remainder.num_chunks(remainder.CHUNK) == 1
    assert remainder.num_chunks(remainder.CHUNK + 1) == 2
