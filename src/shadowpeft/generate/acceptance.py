"""Which drafts stand: Algorithm 1 of Leviathan et al. 2023 (arXiv 2211.17192).

Shapes: k drafts a row, ``drafts`` [B, k]; the target has looked at k + 1 places. ``forced`` [B, k] marks drafts that
are settled already and are not tested again.
"""

import torch
from torch import Tensor


def num_leading(accepted: Tensor) -> Tensor:
    """[B, k] of booleans -> [B]: how many hold before the first that does not."""
    return accepted.long().cumprod(1).sum(1)


def accept_greedy(drafts: Tensor, choices: Tensor, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A draft stands while it is the target's own choice.

    Args:
        choices: [B, k + 1], the target's most likely token at each place.

    Returns:
        ``(number of accepted drafts [B], the target's token behind them [B])``.
    """
    agreed = drafts == choices[:, :-1]
    if forced is not None:
        agreed = agreed | forced
    num_accepted = num_leading(agreed)
    return num_accepted, choices.gather(1, num_accepted[:, None]).squeeze(1)


def accept_sampled(drafts: Tensor, q: Tensor, p: Tensor, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A draft x stands with probability min(1, p(x) / q(x)); the first that falls is redrawn from norm(max(p - q, 0)).

    Args:
        q: [B, k, V], the distributions that the drafts were drawn from.
        p: [B, k + 1, V], the target's at the same places and at the one behind them.

    Returns:
        As :func:`accept_greedy`; the tokens are distributed as if drawn from p one by one.
    """
    num_drafts = drafts.shape[1]
    p_drafts = p[:, :num_drafts].gather(-1, drafts[..., None]).squeeze(-1)
    q_drafts = q.gather(-1, drafts[..., None]).squeeze(-1)
    accepted = torch.rand_like(p_drafts) * q_drafts < p_drafts
    if forced is not None:
        accepted = accepted | forced
    num_accepted = num_leading(accepted)
    rows = torch.arange(drafts.shape[0], device=drafts.device)
    target = p[rows, num_accepted]
    # Behind the last draft nothing was drafted, so nothing is subtracted.
    drafted = torch.cat([q, torch.zeros_like(q[:, :1])], 1) if num_drafts else torch.zeros_like(p)
    rest = (target - drafted[rows, num_accepted]).clamp(min=0)
    # p and q equal up to rounding: a rejection has no weight left to draw from, and p itself is right.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)
    return num_accepted, torch.multinomial(rest, 1).squeeze(1)
