"""The lengths that a real compression leaves: of every layer and sequence, for a batch of forms.

    python benchmarks/record_lengths.py benchmarks/results     # writes kept_lengths.json there

The embedded model reads forms of one to three pages in one batch. Its prompts are short: the
benchmarks (lengths.py) give longer ones the same shares of each layer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from measure import environment

from vlcache_triton import VLCacheConfig, vl_cache
from vlcache_triton.formreader import chat, draw_dialogue, encode_chats, load_form_reader, render

BUDGET = 0.1
NUM_PAGES = (1, 3, 2, 1)


def record() -> dict[str, Any]:
    """Prompt lengths, and the rows that each KV head keeps, `[num_layers][num_seqs]`."""
    model, processor = load_form_reader()
    chats = []
    for seed, num_pages in enumerate(NUM_PAGES):
        form = draw_dialogue(seed=seed, tasks=["value"], num_pages=num_pages)
        chats.append(chat([render(page) for page in form.pages], [form.questions[0].text]))
    inputs = encode_chats(processor, chats)
    with vl_cache(model, VLCacheConfig(budget=BUDGET)) as session:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    report = session.report()
    num_kv_heads = model.config.get_text_config().num_key_value_heads
    return {"num_kv_heads": num_kv_heads, "lengths": report.lengths, "kept": report.kept}


if __name__ == "__main__":
    torch.set_num_threads(1)
    facts = {**environment(), "budget": BUDGET, **record()}
    print(json.dumps(facts))
    if len(sys.argv) > 1:
        (Path(sys.argv[1]) / "kept_lengths.json").write_text(json.dumps(facts, indent=1) + "\n")
