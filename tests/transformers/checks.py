"""What the adapter's tests compare: runs of generate, kept positions, a model's outward state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import oracle
import torch
from families import Family
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.utils import GenerateOutput

from vlcache_triton import VLCacheConfig

GREEDY = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
SAMPLE = dict(GREEDY, do_sample=True, temperature=1.3, top_k=50)
STOCK_ATOL = 1e-5
ORACLE_ATOL = 1e-4


def generate(family: Family, inputs: dict[str, Tensor], arguments: dict, seed: int = 0):
    """model.generate, from this seed on."""
    torch.manual_seed(seed)
    return family.model.generate(**inputs, **arguments)


def logits(out: GenerateOutput) -> Tensor:
    """[num_seqs, steps, vocabulary]"""
    return torch.stack(out.logits, 1)


def assert_same_run(out: GenerateOutput, expected: GenerateOutput, atol: float) -> None:
    assert torch.equal(out.sequences.cpu(), expected.sequences)
    torch.testing.assert_close(logits(out).cpu(), logits(expected), atol=atol, rtol=0)


def assert_kept(cache, kept: oracle.Kept, inputs: dict[str, Tensor], copies: int = 1) -> None:
    """The cache's plan names exactly the tokens that the oracle keeps, layer by layer."""
    layers = [i for i, k in enumerate(kept) if k is not None]
    num_seqs = len(inputs["input_ids"])
    assert cache.is_compressed
    assert cache.plan.keep.shape == (len(layers), num_seqs * copies)
    for row, layer in enumerate(layers):
        for seq in range(num_seqs * copies):
            expected = oracle.positions(kept, inputs, layer, seq // copies)
            num_rows = expected.shape[1] + int(kept.rows[layer][seq // copies, 0])
            assert cache.plan.keep[row, seq] == num_rows
            assert torch.equal(cache.plan.kept_positions(row, seq).cpu().long(), expected)


def assert_compressed_run(
    family: Family, inputs: dict[str, Tensor], config: VLCacheConfig, session, out: GenerateOutput
) -> None:
    """A greedy run inside vl_cache equals the oracle's: kept tokens, tokens and logits."""
    kept = oracle.kept_tokens(family, inputs, config)
    assert_kept(session.cache, kept, inputs)
    arguments = dict(GREEDY, max_new_tokens=len(out.logits))
    with oracle.evicted(family, kept):
        expected = family.model.generate(**inputs, **arguments)
    assert_same_run(out, expected, ORACLE_ATOL)


def model_state(model: PreTrainedModel) -> dict:
    """All of a model that a context manager could forget to put back."""
    kinds = [kind for kind in vars(nn.Module()) if kind.endswith("_hooks")]
    hooks = {
        (name, kind): len(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in kinds
    }
    return dict(
        attention=dict(_attention_implementations("", model.config)),
        config=model.config.to_dict(),
        generation_config=model.generation_config.to_dict(),
        attributes={name: sorted(vars(module)) for name, module in model.named_modules()},
        hooks=hooks,
        training=model.training,
    )


def _attention_implementations(name: str, config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    yield name, config._attn_implementation
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            yield from _attention_implementations(f"{name}.{key}", getattr(config, key))


@contextmanager
def nothing_computed(model: PreTrainedModel) -> Iterator[None]:
    """No part of the model may run in this block, and its state is as before at the end."""
    ran = []
    parts = {id(module) for module in model.modules()} - {id(model)}
    before = model_state(model)
    hook = register_module_forward_pre_hook(
        lambda module, args: ran.append(type(module).__name__) if id(module) in parts else None
    )
    try:
        yield
    finally:
        hook.remove()
    assert not ran
    assert model_state(model) == before
