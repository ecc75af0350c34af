"""The embedded model, loaded once; the evaluation never alters it."""

import pytest
import torch

from vlcache_triton.apps.formreader import load_form_reader


@pytest.fixture(scope="session")
def form_reader():
    """(model, processor)"""
    return load_form_reader()


@pytest.fixture(scope="session")
def eager_maps(form_reader):
    """`eager_maps(query, ids)`: the attention maps of all layers over ids `[1, n]`, by the stock
    model, with the query's image."""
    model, _ = form_reader

    def maps(query, ids):
        before = model.config.text_config._attn_implementation
        model.set_attn_implementation({"text_config": "eager"})
        try:
            with torch.no_grad():
                return model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=query.inputs["pixel_values"],
                    output_attentions=True,
                ).attentions
        finally:
            model.set_attn_implementation({"text_config": before})

    return maps
