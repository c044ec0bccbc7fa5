"""The gated delta rule, as a recurrence and in chunks (arXiv:2412.06464).

    S ← g_t S;   S ← S + k_t ⊗ β_t (v_t − Sᵀ k_t);   o_t = Sᵀ q_t        S in R^(Dk x Dv) per head

Both compute the same. The recurrence is the definition, and what decoding does: its state does not grow. The chunked
form turns the sequence into matrix products: inside a chunk the updates are those of a unit lower triangular system,
whose solution is linear in the state that enters the chunk.

Shapes: q, k [B, H, T, Dk]; v [B, H, T, Dv]; log_decay (log g ≤ 0), beta [B, H, T]; state [B, H, Dk, Dv].
"""

import torch
from torch import Tensor


def recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: o [B, H, T, Dv] and the state after the last token."""
    state = zero_state(k, v) if state is None else state
    outputs = []
    for t in range(q.shape[2]):
        state = state * log_decay[:, :, t, None, None].exp()
        seen = (state * k[:, :, t, :, None]).sum(dim=-2)
        change = beta[:, :, t, None] * (v[:, :, t] - seen)
        state = state + k[:, :, t, :, None] * change.unsqueeze(-2)
        outputs.append((state * q[:, :, t, :, None]).sum(dim=-2))
    return torch.stack(outputs, dim=2), state


def chunked_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """As `recurrent_delta_rule`, `chunk` tokens at a time; any length, padded with tokens that do nothing."""
    length = q.shape[2]
    padding = -length % chunk
    if padding:
        q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, padding)) for t in (q, k, v))
        log_decay, beta = (torch.nn.functional.pad(t, (0, padding)) for t in (log_decay, beta))
    current = zero_state(k, v) if state is None else state
    q, k, v, log_decay, beta = (t.unflatten(2, (-1, chunk)) for t in (q, k, v, log_decay, beta))

    decay = log_decay.cumsum(dim=-1)  # log of the decay from before the chunk to after token i
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~lower, -torch.inf).exp()
    system = (beta.unsqueeze(-1) * (k @ k.mT) * between).tril(diagonal=-1)
    # What every token writes, were the entering state zero; and how that state changes it.
    right = torch.cat((beta.unsqueeze(-1) * v, (beta * decay.exp()).unsqueeze(-1) * k), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    writes, corrections = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = (q @ k.mT) * between
    q_decayed = q * decay.exp().unsqueeze(-1)
    k_to_end = k * (decay[..., -1:] - decay).exp().unsqueeze(-1)
    chunk_decay = decay[..., -1].exp()

    outputs = []
    for c in range(q.shape[2]):
        written = writes[:, :, c] - corrections[:, :, c] @ current
        outputs.append(q_decayed[:, :, c] @ current + scores[:, :, c] @ written)
        current = current * chunk_decay[:, :, c, None, None] + k_to_end[:, :, c].mT @ written
    return torch.cat(outputs, dim=2)[:, :, :length], current


def zero_state(k: Tensor, v: Tensor) -> Tensor:
    """[B, H, Dk, Dv]"""
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
