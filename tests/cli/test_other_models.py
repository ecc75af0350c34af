"""`vlcache` takes models it has never seen: here LLaVA-NeXT, which cuts images into tiles."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from vlcache_triton.apps.formreader.model import WEIGHTS

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, FLOAT32 = 3, 2, 16, 4
PINPOINTS = [[56, 112], [112, 56]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny random model and its processor, saved in half precision."""
    folder = tmp_path_factory.mktemp("llava-next")
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlavaNextConfig(
        vision_config=dict(
            tower, model_type="clip_vision_model", image_size=56, patch_size=14, projection_dim=32
        ),
        text_config=dict(
            model_type="mistral",
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            sliding_window=None,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(config).half().save_pretrained(folder)
    square = {"height": 56, "width": 56}
    LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size=square, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(WEIGHTS / "chat_template.jinja").read_text(),
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def wide_image(tmp_path):
    path = tmp_path / "wide.jpg"
    Image.linear_gradient("L").resize((120, 60)).save(path)
    return path


def test_it_generates_and_inspects(vlcache, model, wide_image):
    asked = ("--model", model, "--image", wide_image, "--prompt", "What is this?", "--budget", 0.4)
    outcome = vlcache("generate", *asked, "--max-new-tokens", 5, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert 1 <= result["new_tokens"] <= 5
    assert len(result["kept"]) == NUM_LAYERS
    bytes_a_token = 2 * NUM_KV_HEADS * HEAD_DIM * FLOAT32
    full_bytes = NUM_LAYERS * result["prompt_tokens"] * bytes_a_token
    assert result["full_kv_bytes"] == full_bytes
    assert result["kv_bytes"] == sum(result["kept"]) * bytes_a_token
    assert result["kv_bytes"] == pytest.approx(0.4 * full_bytes, rel=0.01)

    outcome = vlcache("inspect", *asked, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["lengths"] == [result["prompt_tokens"]]
    assert [kept for (kept,) in report["kept"]] == result["kept"]
