"""The balancing losses of Shazeer et al. 2017 (section 4 and appendix A)."""

from __future__ import annotations

from torch import Tensor

_EPS = 1e-10


def cv_squared(x_E: Tensor) -> Tensor:
    """Squared coefficient of variation, with the population variance (eqs. 7 and 11).

    Args:
        x_E: Importance or load of each expert, shape (E,).

    Returns:
        A scalar, Var(x) / Mean(x)^2; 0 for a single expert and for all zeros.
    """
    return x_E.var(correction=0) / (x_E.mean() ** 2 + _EPS)


def balance_losses(importance_E: Tensor, load_E: Tensor, w_importance: float, w_load: float) -> dict[str, Tensor]:
    """The scaled terms L_importance (eq. 7) and L_load (eq. 11); a term of weight 0 is left out."""
    terms = {"importance": (w_importance, importance_E), "load": (w_load, load_E)}
    return {name: weight * cv_squared(x_E) for name, (weight, x_E) in terms.items() if weight}
