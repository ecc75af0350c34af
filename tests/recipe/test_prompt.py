"""Where the boundary lies: the recipe's table of what the paper leaves open, row by row."""

import pytest
import torch
from prompts import CPU, make_prompt

from vlcache_triton import VLCacheConfig
from vlcache_triton.recipe.prompt import Prompt, last_position, left_pads, read_prompt

CONFIG = VLCacheConfig()


def read(rows, config=CONFIG):
    """Prompts as strings: "." a pad, "I" an image token, "t" a text token."""
    is_visual = torch.tensor([[c == "I" for c in row] for row in rows])
    mask = torch.tensor([[int(c != ".") for c in row] for row in rows])
    return read_prompt(is_visual, mask, config)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("tIIItttt", 4),
        ("IIIIIIIt", 1),
        ("tItIIttt", 3),  # several images: rows after the last visual token
        ("ttIIIIII", 1),  # an image at the very end: the last row
        ("IIIIIIII", 1),
        ("tttttttt", 0),  # no image: left whole
        ("Itttttttt"[:8], 7),
        (".ttItttt", 4),
        (".......t", 0),
        (".......I", 1),
        ("......It", 1),
    ],
)
def test_rows_behind_the_last_visual_token(row, expected):
    prompt = read([row])
    pads = row.count(".")
    assert prompt == Prompt(8, (pads,), (expected,))
    assert prompt.lengths == (8 - pads,)
    assert prompt.is_compressible == (expected > 0)


@pytest.mark.parametrize(
    ("row", "expected"),
    [("tttttttt", 3), (".....ttt", 3), ("......tt", 2), (".......t", 1), ("tItttttt", 6)],
)
def test_a_text_window_serves_prompts_without_an_image_alone(row, expected):
    assert read([row], VLCacheConfig(text_window=3)).query_rows == (expected,)


@pytest.mark.parametrize(
    ("row", "expected"), [("tItttttt", 4), ("tIIIIItt", 2), ("tttttttt", 0), ("IIIIIIII", 1)]
)
def test_max_query_rows_keeps_the_last_ones(row, expected):
    assert read([row], VLCacheConfig(max_query_rows=4)).query_rows == (expected,)


def test_max_query_rows_bounds_the_text_window():
    config = VLCacheConfig(max_query_rows=2, text_window=5)
    assert read(["tttttttt", "..tttttt"], config).query_rows == (2, 2)


def test_each_sequence_of_a_batch_has_its_own_boundary():
    prompt = read(["tIIttttt", "...tIItt", "..tttttt", "tttIIIII"])
    assert prompt == Prompt(8, (0, 3, 2, 0), (5, 2, 0, 1))
    assert prompt.lengths == (8, 5, 6, 8)


def test_no_mask_means_no_pads():
    is_visual = torch.tensor([[False, True, False, False]])
    assert read_prompt(is_visual, None, CONFIG) == Prompt(4, (0,), (2,))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_type(dtype):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).to(dtype)
    assert left_pads(mask) == [2, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("tItt....", "sequence 1.*left padding"),
        ("..It.ttt", "sequence 1.*left padding"),
        ("t......t", "sequence 1.*left padding"),
        (".......t"[::-1], "sequence 1.*left padding"),
        ("........", "no token in sequence 1"),
    ],
)
def test_other_padding_is_refused_by_name(row, message):
    with pytest.raises(ValueError, match=f"^attention_mask: got .*{message}"):
        read(["tIIttttt", row])


def test_a_mask_of_another_shape_is_refused_by_name():
    is_visual = torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^attention_mask: got shape \(2, 9\).*\(2, 8\)"):
        read_prompt(is_visual, torch.ones(2, 9), CONFIG)


def test_last_position_counts_from_one():
    is_visual = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert last_position(is_visual) == [4, 0, 1]


def test_sequences_of_a_batch_without_pads():
    prompt = make_prompt([6, 6], [2, 0])
    cu_seqlens_q, cu_seqlens_k = prompt.cu_seqlens(CPU)
    assert cu_seqlens_q.tolist() == [0, 2, 2]
    assert cu_seqlens_k.tolist() == [0, 6, 12]
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_k[:-1][prompt.segments].tolist() == [0, 6]
    assert prompt.starts(CPU).tolist() == [0, 6, 12]


def test_runs_of_pads_are_sequences_without_query_rows():
    prompt = make_prompt([4, 6, 1], [2, 3, 0])
    cu_seqlens_q, cu_seqlens_k = prompt.cu_seqlens(CPU)
    assert cu_seqlens_q.tolist() == [0, 0, 2, 2, 5, 5, 5]
    assert cu_seqlens_k.tolist() == [0, 2, 6, 6, 12, 17, 18]
    assert cu_seqlens_k[:-1][prompt.segments].tolist() == [2, 6, 17]
    assert cu_seqlens_k.diff()[prompt.segments].tolist() == list(prompt.lengths)
    assert prompt.starts(CPU).tolist() == [2, 6, 17, 18]
    assert prompt.starts(CPU).dtype == torch.int32


@pytest.mark.parametrize("num_rows", [5, 8], ids=["some rows", "all rows"])
def test_query_rows_are_packed_sequence_by_sequence(num_rows):
    prompt = make_prompt([8, 6, 7], [3, 0, 5])
    q = torch.randn(3, 4, num_rows, 16)
    packed = prompt.pack_query_rows(q)
    cu_seqlens_q = prompt.cu_seqlens(CPU)[0]
    assert packed.shape == (8, 4, 16) and cu_seqlens_q[-1] == 8
    for j in range(3):
        assert torch.equal(packed[j], q[0, :, num_rows - 3 + j])
    for j in range(5):
        assert torch.equal(packed[3 + j], q[2, :, num_rows - 5 + j])


def test_the_query_rows_of_a_single_prompt_are_a_view():
    q = torch.randn(1, 4, 8, 16)
    packed = make_prompt([8], [3]).pack_query_rows(q)
    assert packed.shape == (3, 4, 16)
    assert packed.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
    assert torch.equal(packed[0], q[0, :, 5])
