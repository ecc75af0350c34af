"""varlen_decode against torch's SDPA, FlashInfer and flash-attn, at equal live lengths."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, DTYPE, HAS_GPU, check, num_copies
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlcache_triton.kernels import reference
from vlcache_triton.kernels.decode import varlen_decode

NUM_HEADS, HEAD_SIZE = (32, 128) if HAS_GPU else (4, 16)
SHAPES = [
    (1, 1024),
    (1, 8192),
    (1, 32768),
    (1, 131072),
    (16, 1024),
    (16, 8192),
    (64, 256),
    (64, 2048),
]
if not HAS_GPU:
    SHAPES = [(1, 40), (3, 17)]
NUM_KV_HEADS = (8, 32) if HAS_GPU else (2, 4)
# packed: all KV heads of a token side by side. even and ragged: a segment for each KV head, of
# equal lengths, or varying 20-fold and adding up to the same.
LAYOUTS = ("packed", "even", "ragged")


@dataclass
class Inputs:
    """One set of tensors, as varlen_decode takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_k: int
    seqused_k: Tensor

    @property
    def args(self) -> tuple:
        """The positional arguments."""
        return self.q, self.k, self.v, self.cu_seqlens_q, self.cu_seqlens_k, 1, self.max_seqlen_k


def ragged_lengths(num_segments: int, total: int) -> list[int]:
    """Lengths that vary 20-fold, evenly in their logarithm, in shuffled order."""
    spread = [20 ** (i / max(num_segments - 1, 1)) for i in range(num_segments)]
    ends = [round(total * x / sum(spread)) for x in accumulate(spread, initial=0)]
    lengths = [max(1, end - start) for start, end in pairwise(ends)]
    order = torch.randperm(num_segments, generator=torch.Generator().manual_seed(0))
    return [lengths[i] for i in order.tolist()]


@functools.lru_cache(maxsize=1)
def case(layout: str, num_seqs: int, length: int, num_kv_heads: int) -> tuple[list[Inputs], Tensor]:
    """Rotating inputs, and what the fp32 reference makes of the first."""
    if layout == "packed":
        lengths, heads, queries = [length] * num_seqs, num_kv_heads, NUM_HEADS
    else:
        num_segments = num_seqs * num_kv_heads
        lengths, heads, queries = [length] * num_segments, 1, NUM_HEADS // num_kv_heads
        if layout == "ragged":
            lengths = ragged_lengths(num_segments, sum(lengths))
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=DTYPE)

    def make() -> Inputs:
        used = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        return Inputs(
            q=normal(len(lengths), queries, HEAD_SIZE),
            k=normal(sum(lengths), heads, HEAD_SIZE),
            v=normal(sum(lengths), heads, HEAD_SIZE),
            cu_seqlens_q=torch.arange(len(lengths) + 1, dtype=torch.int32, device=DEVICE),
            cu_seqlens_k=F.pad(used.cumsum(0), (1, 0)).int(),
            max_seqlen_k=max(lengths),
            seqused_k=used,
        )

    first = make()
    inputs = [first, *(make() for _ in range(num_copies(kv_bytes(first)) - 1))]
    floats = [x.float() if x.is_floating_point() else x for x in first.args[:5]]
    expected = reference.varlen_decode(
        *floats, 1, first.max_seqlen_k, causal=True, seqused_k=first.seqused_k
    )
    return inputs, expected


def kv_bytes(inputs: Inputs) -> int:
    """Bytes of K and V."""
    return inputs.k.nbytes + inputs.v.nbytes


def ours(x: Inputs) -> Callable[[], Tensor]:
    """varlen_decode, lengths on the device, workspace and output of each launch its own."""
    return lambda: varlen_decode(*x.args, causal=True, seqused_k=x.seqused_k)


def biased(x: Inputs) -> Callable[[], Tensor]:
    """As ours, with a bias of every first key, which is 0: what it costs, for the same result."""
    bias = torch.zeros(len(x.seqused_k) * x.k.shape[1], device=DEVICE)
    return lambda: varlen_decode(*x.args, causal=True, seqused_k=x.seqused_k, first_key_bias=bias)


def sdpa(backend: SDPBackend, x: Inputs) -> Callable[[], Tensor]:
    """torch's SDPA over views of the same K and V."""
    num_seqs = len(x.q)
    k, v = (y.view(num_seqs, -1, *y.shape[1:]).transpose(1, 2) for y in (x.k, x.v))

    def run() -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(x.q[:, :, None], k, v, enable_gqa=True)
        return out[:, :, 0]

    return run


def flash_attn(x: Inputs) -> Callable[[], Tensor]:
    """flash_attn_varlen_func of flash-attn 2.8, which reads the ragged layout too."""
    from flash_attn import flash_attn_varlen_func

    return lambda: flash_attn_varlen_func(*x.args, causal=True)


def flashinfer(x: Inputs) -> Callable[[], Tensor]:
    """BatchDecodeWithPagedKVCacheWrapper on pages of 16; its plan, made on the host, not timed."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    page, num_seqs, (heads, d) = 16, len(x.q), x.k.shape[1:]
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    pages = len(x.k) // page
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE) * (pages // num_seqs)
    wrapper.plan(
        starts,
        torch.arange(pages, dtype=torch.int32, device=DEVICE),
        torch.full((num_seqs,), page, dtype=torch.int32, device=DEVICE),
        x.q.shape[1],
        heads,
        d,
        page,
        q_data_type=DTYPE,
        kv_data_type=DTYPE,
    )
    cache = tuple(y.view(pages, page, heads, d) for y in (x.k, x.v))
    return lambda: wrapper.run(x.q, cache)


PEERS: dict[str, Callable[[Inputs], Callable[[], Tensor]]] = {
    "ours": ours,
    "ours-biased": biased,
    "sdpa-fa2": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa-math": functools.partial(sdpa, SDPBackend.MATH),
    "flash_attn": flash_attn,
    "flashinfer": flashinfer,
}


def contestants(layout: str) -> list[str]:
    """Who can read the layout, on this machine."""
    if layout == "ragged":
        return ["ours", "ours-biased", "flash_attn"]
    if layout == "even":
        return ["ours"]
    if not HAS_GPU:
        return ["ours", "sdpa-math"]
    return ["ours", "sdpa-fa2", "sdpa-cudnn", "flash_attn", "flashinfer"]


ENTRIES = [
    pytest.param(layout, *shape, heads, peer, id=f"{layout}-{shape[0]}x{shape[1]}-{heads}-{peer}")
    for layout in LAYOUTS
    for heads in (NUM_KV_HEADS if layout == "packed" else NUM_KV_HEADS[:1])
    for shape in SHAPES
    for peer in contestants(layout)
]


@pytest.mark.parametrize(("layout", "num_seqs", "length", "num_kv_heads", "peer"), ENTRIES)
def test_decode(measure, layout, num_seqs, length, num_kv_heads, peer):
    if peer in ("flash_attn", "flashinfer") and importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")
    inputs, expected = case(layout, num_seqs, length, num_kv_heads)
    launches = [PEERS[peer](x) for x in inputs]
    check(launches[0](), expected)
    measure(
        launches,
        nbytes=kv_bytes(inputs[0]) + 2 * inputs[0].q.nbytes,
        layout=layout,
        num_seqs=num_seqs,
        length=length,
        num_kv_heads=num_kv_heads,
        peer=peer,
    )
