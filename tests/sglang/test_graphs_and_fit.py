"""The widths of captured steps, and the line about flags that fit."""

from types import SimpleNamespace

import pytest

from vlcache_triton.integrations.sglang.fitting import (
    describe_fit,
    longest_prompt,
    running_at_once,
)
from vlcache_triton.integrations.sglang.graphs import LiveWidths, graph_widths, width_of
from vlcache_triton.integrations.sglang.prompts import PromptTable, slots_needed
from vlcache_triton.recipe.config import VLCacheConfig

CONFIG = VLCacheConfig(budget=0.1)


@pytest.mark.parametrize(
    "context, widths",
    [
        (2047, (2047,)),
        (8191, (8191,)),
        (8192, (2048, 8192)),
        (32768, (2048, 32768)),
        (131072, (2048, 16384, 131072)),
    ],
)
def test_widths_step_up_to_the_context(context, widths):
    assert graph_widths(context) == widths


def test_a_step_takes_the_narrowest_graph_that_holds_its_longest_request():
    table = PromptTable(CONFIG, 4)
    table.graph_widths = graph_widths(131072)
    variants = LiveWidths(table)
    assert variants.capture_labels == ("live-131072", "live-16384", "live-2048")
    for longest, width in ((1, 2048), (2048, 2048), (2049, 16384), (131072, 131072)):
        table.longest_live = longest
        assert width_of(variants.select(SimpleNamespace()), table) == width
    table.longest_live = None
    assert width_of(variants.select(SimpleNamespace()), table) == 131072
    assert width_of(None, table) == 131072


@pytest.mark.parametrize("length", [37, 500, 3000])
def test_so_many_prompts_do_run_at_once_and_no_more(length):
    slots, needed = 4000, slots_needed(length, 4, CONFIG)
    count = running_at_once(length, slots, 4, CONFIG)
    assert (count - 1) * needed + length <= slots < count * needed + length
    longest = longest_prompt(count, slots, slots, 4, CONFIG)
    assert longest >= length
    assert running_at_once(longest, slots, 4, CONFIG) >= count
    assert running_at_once(longest + 1, slots, 4, CONFIG) < count


def test_the_line_names_the_flags():
    line = describe_fit(CONFIG, 4, slots=20000, context=8192, running=48, graph_bs=48)
    assert "20000 KV slots hold 15 image prompts of 8192 tokens" in line
    assert "--max-running-requests 15 --cuda-graph-max-bs 15 is enough" in line
    assert "1.5 MiB (--cuda-graph-max-bs 48 times 8192 tokens)" in line
    line = describe_fit(CONFIG, 4, slots=2000, context=8192, running=1, graph_bs=0)
    assert "--context-length 8192 is more than a prefill finds slots for: 2000 fits" in line
    assert "graph" not in line
