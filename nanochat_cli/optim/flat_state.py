"""State of parameters that are updated element by element, in 8 bits where that pays.

A quantised parameter is a row of blocks, of which a step updates some at a time, so that a large state never exists
in float32 as a whole. Parameters below MINIMUM elements (norms, gates) stay in float32, as in arXiv:2110.02861.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_cli.optim.quantized_state import Code, QuantizedState, WholeState, make_state

MINIMUM = 4096
CHUNK = {"cpu": 2**18}
"""Elements of a quantised parameter that are updated together, by device: on a CPU as many as fit into its caches."""
LARGE_CHUNK = 2**20
"""On other devices, where a launch costs more than memory does."""


@dataclass(frozen=True)
class Piece:
    """items: a slice of the states; parameter: flat view; gradient: float32 in the shape of the items."""

    items: slice
    parameter: Tensor
    gradient: Tensor

    def flat(self, update: Tensor) -> Tensor:
        """An update in the shape of the items, as one in the shape of `parameter`."""
        return update.reshape(-1)[: self.parameter.numel()]


def flat_state(parameter: nn.Parameter, code: Code, block: int | None) -> WholeState | QuantizedState:
    """A state of zeros. block: elements that share a scale; None for float32."""
    if block is None or parameter.numel() < MINIMUM:
        return make_state(1, tuple(parameter.shape), parameter.device)
    return make_state(-(-parameter.numel() // block), (block,), parameter.device, code, block)


def pieces(parameter: nn.Parameter, state: WholeState | QuantizedState) -> Iterator[Piece]:
    """The pieces of one update; the parameter must have a gradient."""
    assert parameter.grad is not None
    flat, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)
    if isinstance(state, WholeState):
        yield Piece(slice(0, 1), flat, parameter.grad.float()[None])
        return
    block = state.size
    step = CHUNK.get(parameter.device.type, LARGE_CHUNK) // block * block
    for start in range(0, len(flat), step):
        piece = gradient[start : start + step].float()
        padded = F.pad(piece, (0, -len(piece) % block))
        items = slice(start // block, start // block + len(padded) // block)
        yield Piece(items, flat[start : start + step], padded.view(-1, block))


def saved(kind: str, state: WholeState | QuantizedState) -> dict[str, Tensor]:
    """A parameter's state as a checkpoint has it; whole state has the parameter's shape."""
    items = 0 if isinstance(state, WholeState) else slice(None)
    return {kind + suffix: tensor for suffix, tensor in state.saved(items).items()}
