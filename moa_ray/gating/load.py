"""The smooth load estimator of Shazeer et al. 2017, appendix A (eqs. 8-10)."""

from __future__ import annotations

import torch
from torch import Tensor


def kth_excluding(top_TJ: Tensor, index_TJ: Tensor, num_experts: int) -> Tensor:
    """For every i, the k-th largest component of a row leaving out component i.

    That is the (k+1)-th largest of the row where i is among the top k, and the k-th elsewhere,
    so one top-(k+1) serves all experts.

    Args:
        top_TJ: The k + 1 largest components of each row, in falling order; k >= 1.
        index_TJ: Where they stand in their rows.
        num_experts: E, components of a row.

    Returns:
        Tensor of shape (T, E).
    """
    chosen_TE = torch.zeros(len(top_TJ), num_experts, dtype=torch.bool, device=top_TJ.device)
    chosen_TE.scatter_(1, index_TJ[:, :-1], True)
    return torch.where(chosen_TE, top_TJ[:, -1:], top_TJ[:, -2:-1])


def load_probability(clean_TE: Tensor, std_TE: Tensor, top_TJ: Tensor, index_TJ: Tensor) -> Tensor:
    """P(x, i): the chance that expert i is chosen if only the noise on expert i were drawn anew (eq. 9).

    Args:
        clean_TE: Logits x W_g without noise.
        std_TE: Standard deviation of the noise, above 0.
        top_TJ: The k + 1 largest components of each row of H(x), the logits with noise; k < E.
        index_TJ: Where they stand in their rows.

    Returns:
        Probabilities of shape (T, E), differentiable in the first three. A row need not sum to k,
        since each entry is conditional on the noise of the others.
    """
    margin_TE = clean_TE - kth_excluding(top_TJ, index_TJ, clean_TE.shape[1])
    p_TE: Tensor = torch.special.ndtr(margin_TE / std_TE)
    return p_TE
