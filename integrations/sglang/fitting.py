"""Which flags of the server fit a budget: one line for its log."""

from __future__ import annotations

from bisect import bisect_left

from vlcache_triton.recipe.config import VLCacheConfig

from .prompts import slots_needed


def running_at_once(length: int, slots: int, num_layers: int, config: VLCacheConfig) -> int:
    """How many image prompts of a length a pool holds, answers not counted: all but the last one
    compressed, as that needs all of its slots until its prefill ends."""
    if length > slots:
        return 0
    return (slots - length) // slots_needed(length, num_layers, config) + 1


def longest_prompt(
    running: int, most: int, slots: int, num_layers: int, config: VLCacheConfig
) -> int:
    """The longest image prompt, of at most `most` tokens, of which so many run at once."""

    def is_too_long(length: int) -> bool:
        return running_at_once(length, slots, num_layers, config) < running

    return bisect_left(range(1, most + 1), True, key=is_too_long)


def describe_fit(
    config: VLCacheConfig, num_layers: int, slots: int, context: int, running: int, graph_bs: int
) -> str:
    """What the pool holds at this budget, and the flags that follow from it.

    Args:
        slots: of the pool. context: the longest request that the model takes.
        running: --max-running-requests. graph_bs: the largest captured batch, 0 where none is.
    """
    whole = min(context, slots)
    fit = running_at_once(whole, slots, num_layers, config)
    longest = longest_prompt(running, whole, slots, num_layers, config)
    parts = [
        f"vlcache: {slots} KV slots hold {fit} image prompts of {whole} tokens at once, the last"
        " one uncompressed, answers not counted"
    ]
    if context > slots:
        parts.append(
            f"--context-length {context} is more than a prefill finds slots for: {slots} fits"
        )
    if fit < running:
        parts.append(
            f"--max-running-requests {running} fits prompts of up to {longest} tokens; for longer"
            f" ones --max-running-requests {fit} --cuda-graph-max-bs {fit} is enough"
        )
    else:
        parts.append(f"--max-running-requests {running} fits all of them, and {fit} would")
    if graph_bs:
        mib = graph_bs * whole * 4 / 2**20
        parts.append(
            f"tables of captured steps take {mib:.1f} MiB (--cuda-graph-max-bs {graph_bs} times"
            f" {whole} tokens)"
        )
    return "; ".join(parts) + "."
