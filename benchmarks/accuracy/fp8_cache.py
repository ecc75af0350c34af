"""What fp8 K and V cost in answers: pages of the split "test", each compressed with and without.

python benchmarks/accuracy/fp8_cache.py --pages 30
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import typer

from vlcache_triton import VLCacheConfig
from vlcache_triton.apps.evaluation.items import SUITES, Item, encode_form, form_item
from vlcache_triton.formreader import load_form_reader
from vlcache_triton.integrations.transformers import vl_cache

TASKS = ("value", "field", "next", "list")
PRESETS = {"paper": VLCacheConfig, "tuned": VLCacheConfig.tuned}
CPU = torch.device("cpu")


def answer(model: Any, processor: Any, item: Item, config: VLCacheConfig) -> str:
    """The greedy answer of a compressed cache."""
    inputs = encode_form(processor, item, CPU).inputs
    with vl_cache(model, config, cuda_graph=False) as session:
        out = session.generate(**inputs, max_new_tokens=item.max_new_tokens, do_sample=False)
    tokens = out[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True).strip()


def main(pages: int = 30, budget: float = 0.1) -> None:
    """A table in Markdown: right answers without and with fp8, and how many are the same text."""
    torch.set_num_threads(1)
    model, processor = load_form_reader()
    print("| task | preset | right | right in fp8 | the same text |\n|---|---|---:|---:|---:|")
    for suite in (suite for suite in SUITES if suite.name in TASKS):
        counts: Counter[tuple[str, str]] = Counter()
        for index in range(pages):
            item = form_item(suite, index)
            for preset, make in PRESETS.items():
                plain, fp8 = (
                    answer(model, processor, item, make(budget=budget, kv_cache_dtype=dtype))
                    for dtype in ("auto", "fp8_e4m3")
                )
                counts[preset, "right"] += plain in item.answers
                counts[preset, "fp8"] += fp8 in item.answers
                counts[preset, "same"] += plain == fp8
        for preset in PRESETS:
            right, in_fp8, same = (counts[preset, x] for x in ("right", "fp8", "same"))
            print(f"| {suite.name} | {preset} | {right} | {in_fp8} | {same} of {pages} |")


if __name__ == "__main__":
    typer.run(main)
