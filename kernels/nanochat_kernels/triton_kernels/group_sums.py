"""Sums of activation codes in the groups of a weight's scales, which correct its biased codes."""

import torch
from torch import Tensor

from nanochat_kernels.reference.activations import QuantizedActivations
from nanochat_kernels.reference.activations import group_sums as sums_of_codes
from nanochat_kernels.reference.packed import PackedTernary


def sums_per_scale(activations: QuantizedActivations, weight: PackedTernary) -> Tensor:
    """int32 [M, G], contiguous, G being the weight's scales per row.

    Those that came with the activations, if they fit or are finer; otherwise, and where none came, from the codes.
    """
    groups, given = weight.n_groups, activations.sums.shape[-1]
    if given == groups:
        sums = activations.sums
    elif given and given % groups == 0:
        sums = activations.sums.reshape(-1, groups, given // groups).sum(dim=-1, dtype=torch.int32)
    else:
        sums = sums_of_codes(activations.codes, weight.group)
    return sums.reshape(-1, groups).contiguous()
