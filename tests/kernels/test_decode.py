"""varlen_decode against its fp32 specification: packed, paged, windows, softcap, dead rows."""

import pytest
import torch
from support import cumulative

from vlcache_triton import reference
from vlcache_triton.kernels.decode import varlen_decode


@pytest.mark.parametrize("options", [{}, {"window_size": (20, -1)}, {"softcap": 3.0}])
@pytest.mark.parametrize("page_size", [None, 1, 16])
@pytest.mark.parametrize("lengths_q", [[1, 1, 1], [5, 0, 3]])
@pytest.mark.parametrize("shape", [(8, 2, 64, 64), (7, 1, 80, 48)])
def test_equals_the_reference(shape, lengths_q, page_size, options, device):
    num_heads, num_kv_heads, d, d_v = shape
    torch.manual_seed(0)
    lengths = [150, 17, 1]
    used = torch.tensor([140, 0, 1], dtype=torch.int32, device=device)
    q = torch.randn(sum(lengths_q), num_heads, d, device=device)
    if page_size is None:
        rows, block_table = (sum(lengths),), None
    else:
        blocks = [-(-n // page_size) for n in lengths]
        order = torch.randperm(sum(blocks)).int().split(blocks)
        block_table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True).to(device)
        rows = (sum(blocks), page_size)
    k = torch.randn(*rows, num_kv_heads, d, device=device)
    v = torch.randn(*rows, num_kv_heads, d_v, device=device)
    if page_size is None:
        k[140:150] = v[140:150] = torch.nan  # dead rows
    arguments = (q, k, v, cumulative(lengths_q, device), cumulative(lengths, device), 5, 160)
    given = {"seqused_k": used, "block_table": block_table, "return_softmax_lse": True, **options}
    expected, expected_lse = reference.varlen_decode(*arguments, **given)
    out, lse = varlen_decode(*arguments, **given)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-4)
