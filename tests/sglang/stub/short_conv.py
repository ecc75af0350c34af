"""Stands in for SGLang's causal_conv1d: Triton's interpreter does not take its masks."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query_start_loc: Tensor,
    cache_indices: Tensor,
    has_initial_state: Tensor,
    conv_states: Tensor,
    activation: None,
) -> Tensor:
    """x `[d, total_q]` and each sequence's last inputs `[num_states, d, width - 1]`, kept there."""
    bounds, parts = query_start_loc.tolist(), []
    for i, index in enumerate(cache_indices.tolist()):
        state = conv_states[index]
        before = state if has_initial_state[i] else torch.zeros_like(state)
        inputs = torch.cat([before, x[:, bounds[i] : bounds[i + 1]]], 1)
        parts.append(F.conv1d(inputs[None], weight[:, None], bias, groups=len(x))[0])
        state.copy_(inputs[:, inputs.shape[1] - state.shape[1] :])
    return torch.cat(parts, 1)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: None,
    conv_state_indices: Tensor,
) -> Tensor:
    """One step, x `[num_seqs, d]`."""
    starts = torch.arange(len(x) + 1)
    is_later = torch.ones(len(x), dtype=torch.bool)
    arguments = starts, conv_state_indices, is_later, conv_state, activation
    return causal_conv1d_fn(x.T, weight, bias, *arguments).T
