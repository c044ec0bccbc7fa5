"""Ternary matrices cut into rows by torch's FSDP2, of which two bits per weight are gathered for a block.

`fully_shard` asks a parameter what to gather, and makes the parameter of the whole matrix from that. Here both are a
shape without memory: what a rank keeps and gathers are the bytes of its rows (`weight_bytes.to_rows`), which are
unpacked into the buffers with which a layer computes. FSDP frees these after the block, and has them filled again
before its backward pass; then it takes the gradients, of which a rank keeps its rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultAllocMixin
from torch.utils._pytree import tree_leaves, tree_map_only

from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.distributed.group import Group
from nanochat_cli.training.distributed.tree import Node, TreeSum
from nanochat_cli.training.distributed.weight_bytes import from_rows


@dataclass(eq=False)
class Shard:
    """A layer, and what this rank keeps of it: uint8 [N / ranks, bytes of a row]."""

    layer: BitLinear
    rows: Tensor


class Unheld(torch.Tensor):
    """A float32 weight [rows, K] that has no memory: to be cut, named and gathered, and to receive a gradient."""

    shard: Shard

    @staticmethod
    def __new__(cls, like: Tensor, shard: Shard) -> "Unheld":
        """like: of its shape and strides, on the meta device."""
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue] - torch has no stub
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=shard.rows.device
        )

    def __init__(self, like: Tensor, shard: Shard) -> None:
        self.shard = shard

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore - operations reach the next method

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A view or copy of nothing is nothing, of the shape that it would have."""
        first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, cls))
        if func._schema.is_mutable:
            return args[0]
        shapes, options = tree_map_only(cls, _shape, (args, kwargs or {}))
        found = func(*shapes, **(options | {"device": "meta"} if "device" in options else options))
        return tree_map_only(Tensor, lambda shape: cls(shape, first.shard), found)

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[Tensor], None]:
        """What FSDP gathers."""
        return (self.shard.rows,), None

    def fsdp_post_all_gather(
        self, outputs: Sequence[Tensor], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> "tuple[Unheld, tuple[Tensor, ...]] | None":
        """Fill the layer's buffers from the bytes of all rows. Returns the first time what FSDP is to free."""
        layer, (rows,) = self.shard.layer, outputs
        buffers = held_by(layer)
        if out is None:
            resize(buffers, whole=True)
        with _unsafe_preserve_version_counter(buffers):  # as FSDP does: the backward pass sees no change
            layer.hold(from_rows(rows, layer))
        shape = torch.empty(len(rows), layer.in_features, device="meta")
        return (Unheld(shape, self.shard), buffers) if out is None else None


def _shape(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def held_by(layer: BitLinear) -> tuple[Tensor, ...]:
    """The buffers with which a layer computes."""
    found = (layer.operand, layer.scales, layer.packed, layer.transposed)
    return tuple(buffer for buffer in found if buffer is not None)


def resize(buffers: Iterable[Tensor], *, whole: bool) -> None:
    """Give tensors the memory of all their elements, or none."""
    for buffer in buffers:
        buffer.untyped_storage().resize_(buffer.numel() * buffer.itemsize if whole else 0)


def added(parts: Sequence[Tensor]) -> Tensor:
    """The sum of what neighbours sent, by the tree; changes them."""
    total: TreeSum[Tensor] = TreeSum(len(parts), Tensor.add_)
    for place, part in enumerate(parts):
        total.put(Node(0, place), part)
    return total.total


class _Gather(DefaultAllGather):
    """torch's, with the one line when another rank has ended."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._group.contact():
            return super().__call__(*args, **kwargs)


class _ReduceScatter(DefaultAllocMixin, ReduceScatter):
    """Each rank adds its rows of all gradients in the order of the ranks' units."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        parts = self._group.transpose(input_tensor.view(self._group.size, -1))
        output_tensor.copy_(added(parts.unbind()))


def shard_blocks(model: Transformer, shards: Iterable[Shard], group: Group) -> None:
    """Have FSDP gather these layers block by block from now on. Their latents are no longer the model's parameters.

    Everything else of the model stays as it is.
    """
    cut = set()
    for shard in shards:
        shape = torch.empty(shard.layer.weight.shape, device="meta")
        shard.layer.weight = nn.Parameter(Unheld(shape, shard))
        resize(held_by(shard.layer), whole=False)
        cut.add(shard.layer.weight)
    mesh = DeviceMesh.from_group(dist.group.WORLD, group.device.type)  # pyright: ignore[reportArgumentType] - it is open
    gather, reduce_scatter = _Gather(group), _ReduceScatter(group)
    for module in (*model.blocks, model):
        ignored = {parameter for parameter in module.parameters() if parameter not in cut}
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_custom_all_gather(gather)
        sharded.set_custom_reduce_scatter(reduce_scatter)
