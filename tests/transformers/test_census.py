"""Each of Transformers' image-and-text families is tested, or refused, or said to be untested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import FURTHER, HYBRID, SUPPORTED, VIDEOS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlcache_triton.integrations.transformers import VLCache, vl_cache

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
SPARSE = dict(num_hidden_layers=2, layer_types=["minimax_m3_sparse", "full_attention"])

#: Families that their configurations give away: what is given to these, and what the refusal says.
REFUSED = {
    "diffusion_gemma": ({}, "by diffusion"),
    "florence2": ({}, "encoder-decoder"),
    "pix2struct": ({}, "encoder-decoder"),
    "pp_formulanet": ({}, "encoder-decoder"),
    "t5gemma2": ({}, "encoder-decoder"),
    "udop": ({}, "encoder-decoder"),
    "glm5_next": ({}, "MLA"),
    "hy_v4_vl": ({}, "MLA"),
    "kimi_k25": ({}, "MLA"),
    "mistral4": ({}, "MLA"),
    "mistral_large4": ({}, "MLA"),
    "inkling_mm_model": ({}, "'hybrid"),
    "inkling2": ({}, "'hybrid"),
    "inkling2_loop": ({}, "'hybrid"),
    "minimax_m3_vl": (dict(text_config=SPARSE), "'minimax_m3_sparse'"),
    "qwen4_exp": ({}, "'(indexed_attention|qwen_sparse_attention)'"),  # by release
    "unlimited_ocr": ({}, "'reference_sliding_attention'"),
}


def test_the_docs_tell_of_every_family():
    census = DOCS.read_text().split("## The census\n")[1].split("\n## ")[0]
    told = set(re.findall(r"[\w-]+(?:\.\d)?", census))
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - told == set()
    assert {
        *REFUSED,
        *SUPPORTED,
        *FURTHER,
        *HYBRID,
        *(name.removesuffix("_video") for name in VIDEOS),
    } <= told


@pytest.mark.parametrize("name", REFUSED)
def test_a_configuration_is_refused(name):
    if name not in hf.CONFIG_MAPPING:
        pytest.skip(f"Transformers {hf.__version__} has no {name}")
    given, reason = REFUSED[name]
    config = hf.CONFIG_MAPPING[name](**given)
    with pytest.raises(NotImplementedError, match=reason):
        VLCache(config)


@pytest.mark.parametrize(
    "name",
    ["BlipForConditionalGeneration", "EvollaForProteinText2Text", "PI0ForConditionalGeneration"],
)
def test_a_model_is_refused(name):
    """Attention of its own; text rows that are not causal; actions of a robot, not text."""
    model_class = getattr(hf, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class()).eval()
    refused = pytest.raises((NotImplementedError, ValueError), match=r"^model: got ")
    with refused, vl_cache(model, budget=0.4):
        pytest.fail("the block was entered")
