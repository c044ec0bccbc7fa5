"""Rows that hold several documents: which tokens a token may look at, and its position in its own document."""

import torch
from torch import Tensor


def document_mask(tokens: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """A causal mask, bool [B, 1, T, T], true where a query may look, and positions, int64 [B, T], from 0 in a document.

    tokens: int64 [B, T]; end: the id of the last token of every document. So a document in a row is computed as it is
    alone.
    """
    is_end = tokens == end
    number = is_end.cumsum(1) - is_end.long()  # the token that ends a document belongs to it
    places = torch.arange(tokens.shape[1], device=tokens.device)
    same = number.unsqueeze(2) == number.unsqueeze(1)
    starts = torch.nn.functional.pad(is_end[:, :-1], (1, 0), value=True)
    first = torch.where(starts, places, 0).cummax(1).values
    return (same & (places.unsqueeze(1) >= places)).unsqueeze(1), places - first
