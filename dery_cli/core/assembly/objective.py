"""An additive objective that is learnt from built networks, and what it does not know yet.

Legend: B built networks, F terms, S scales.

A path's worth is a weighted sum of terms of its parts, so that the exact search can maximise it.
The weights start from a formula made by hand and move as far as built networks ask for: Bayesian
linear regression of what the formula leaves over, with the spread of the weights and the noise of
the outcomes chosen by the evidence (D. J. C. MacKay, "Bayesian Interpolation", Neural Computation
1992). What the data leave open is the posterior's spread; weights drawn from it name the paths that
would be best if the present belief were wrong in one of the ways it may be (W. R. Thompson,
Biometrika 1933), and these are the ones worth building next.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

SPREADS = (0.03, 0.06, 0.1, 0.2, 0.3)
"""Standard deviations of a weight, in those of the outcomes; the evidence chooses. Wider ones fit
a dozen builds too closely."""

NOISES = (0.3, 0.5, 0.7, 1.0)
"""Standard deviations of an outcome about the sum, likewise: no sum explains all of it."""


LEAST_SCALE, FLOOR = 1e-3, 0.05
"""A term that hardly varies among what may be built teaches nothing; one that varies little must
not get a weight that paths elsewhere in the space would be ranked by."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the terms, as far as built networks tell.

    Args:
        mean_F: Most probable weights.
        root_FF: Draws are ``mean_F + root_FF @ standard normal``.
        offset: Of a network's sum to its outcome.
        builds: How many networks it was learnt from.
    """

    mean_F: FloatArray
    root_FF: FloatArray
    offset: float
    builds: int

    def predict(self, terms_BF: FloatArray) -> FloatArray:
        """Outcomes to expect, (B,)."""
        return terms_BF @ self.mean_F + self.offset

    def draw(self, generator: np.random.Generator) -> FloatArray:
        """Weights that may as well be true, (F,)."""
        drawn: FloatArray = self.mean_F + self.root_FF @ generator.standard_normal(len(self.mean_F))
        return drawn


def learn(
    terms_BF: FloatArray, outcome_B: FloatArray, prior_F: FloatArray, scale_F: FloatArray
) -> Objective:
    """Weights that the outcomes of built networks make probable.

    Args:
        terms_BF: Of the built networks.
        outcome_B: What each came to; finite.
        prior_F: Weights of the formula to start from.
        scale_F: Deviation of each term among networks that might be built; a term of next to none
            is left as the formula has it.

    Returns:
        The posterior; it is the formula itself where nothing was built.
    """
    count = len(outcome_B)
    used_F = scale_F > LEAST_SCALE
    divisor_F = np.where(used_F, scale_F.clip(min=FLOOR), 1.0)
    z_BF = np.where(used_F, terms_BF / divisor_F, 0.0)
    rest_B = outcome_B - terms_BF @ prior_F
    offset = float(rest_B.mean()) if count else 0.0
    mean_zF = z_BF.mean(0) if count else np.zeros(len(prior_F))
    centred_BF, centred_B = z_BF - mean_zF, rest_B - offset
    unit = float(outcome_B.std()) if count > 1 else 0.0
    unit = unit or 0.05
    spread, noise = _by_evidence(centred_BF, centred_B / unit)
    precision_FF = centred_BF.T @ centred_BF / noise**2 + np.eye(len(prior_F)) / spread**2
    values_F, vectors_FF = np.linalg.eigh(precision_FF)
    # in units of the outcomes' deviation until here
    moved_F = vectors_FF @ ((vectors_FF.T @ (centred_BF.T @ centred_B)) / values_F) / noise**2
    root_FF = unit * vectors_FF / np.sqrt(values_F)
    back_F = np.where(used_F, 1 / divisor_F, 0.0)
    return Objective(
        mean_F=prior_F + back_F * moved_F,
        root_FF=back_F[:, None] * root_FF,
        offset=offset - float(mean_zF @ moved_F),
        builds=count,
    )


def _by_evidence(z_BF: FloatArray, rest_B: FloatArray) -> tuple[float, float]:
    """The spread of weights and the noise of the highest marginal likelihood; ties to the least."""
    if len(rest_B) < 2:
        return SPREADS[len(SPREADS) // 2], NOISES[-1]
    values_B, vectors_BB = np.linalg.eigh(z_BF @ z_BF.T)
    along_B = np.square(vectors_BB.T @ rest_B)
    best, chosen = -np.inf, (SPREADS[0], NOISES[-1])
    for spread in SPREADS:
        for noise in NOISES:
            variance_B = spread**2 * values_B.clip(min=0.0) + noise**2
            evidence = -0.5 * float((np.log(variance_B) + along_B / variance_B).sum())
            if evidence > best + 1e-9:
                best, chosen = evidence, (spread, noise)
    return chosen
