"""Rows of a batch that take part in the backward pass, chosen after the forward pass (Collider, arXiv:2502.00340).

A `KeptRows` is two tensors of fixed shape that are filled between the forward and the backward pass. Everything that
reads them is an opaque operation on the gradient: a compiler can neither move it into the forward pass nor specialise
on how many rows there are.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class KeptRows(NamedTuple):
    """rows: int64 [M], of which the first `n_kept` are kept, ascending; n_kept: int64 [], on the CPU.

    known: the choice was made before the forward pass, which may therefore save only the kept rows.
    """

    rows: Tensor
    n_kept: Tensor
    known: bool = False

    @classmethod
    def all_of(cls, n: int, device: torch.device | str = "cpu", *, known: bool = False) -> "KeptRows":
        """`n` rows, none of them filtered yet."""
        return cls(torch.arange(n, device=device), torch.tensor(n), known)

    def choose(self, rows: Tensor) -> None:
        """Keep these rows, int64 [R], ascending. Autograd does not see it: what was saved for backward reads them."""
        self.rows.data[: len(rows)] = rows
        self.n_kept.data.fill_(len(rows))

    @property
    def chosen(self) -> Tensor | None:
        """int64 [R]; None if every row is kept."""
        return kept_index(self.rows, self.n_kept)


def kept_index(rows: Tensor, count: Tensor) -> Tensor | None:
    """The first `count` of `rows`; None if that is all of them."""
    n = int(count)
    return None if n == len(rows) else rows[:n]


def scatter_rows(x: Tensor, index: Tensor | None, total: int) -> Tensor:
    """x [R, C] as rows `index` of zeros [total, C]; x itself if all are kept (None)."""
    return x if index is None else x.new_zeros(total, x.shape[1]).index_copy_(0, index, x)


def drop_filtered(x: Tensor, kept: KeptRows | None) -> Tensor:
    """x, without gradients for the rows that are not kept: [..., C] with M rows in its leading dimensions.

    Like `torch.where(keep, x, x.detach())`, for a choice that is made later.
    """
    return x if kept is None else _DropFiltered.apply(x, kept.rows, kept.n_kept)  # pyright: ignore[reportReturnType]


class _DropFiltered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, count: Tensor) -> Tensor:
        ctx.save_for_backward(rows, count)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _zero_filtered(grad_outputs[0], *ctx.saved_tensors), None, None


@torch.library.custom_op("nanochat::zero_filtered", mutates_args=())
def _zero_filtered(dy: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    """dy with zeros in the rows that are not kept; its leading dimensions together are the rows."""
    index = kept_index(rows, count)
    if index is None:
        return dy.clone()
    flat = dy.reshape(len(rows), -1)
    return torch.zeros_like(flat).index_copy_(0, index, flat[index]).reshape(dy.shape)


@_zero_filtered.register_fake
def _(dy: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    return dy.new_empty(dy.shape)
