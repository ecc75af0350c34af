"""What the stock model attends to, for the evaluation's tests to be held against."""

import pytest
import torch


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
