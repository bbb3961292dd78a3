r"""How far the training loss can be below the expected loss, from stability.

Let $f_S(w) = \frac1n \sum_i \ell(w; z_i)$ be the empirical risk of a sample $S$ of $n$ independent
examples. Training is *stable* if the loss on an example hardly depends on whether that example was
trained on. A Polyak-Łojasiewicz (PL) coefficient $\mu$ of $f_S$ and a Lipschitz constant $L$ of the
loss give such stability (`pointwise_hypothesis_stability`), and stability bounds the expected loss
(`generalisation_bound`, `generalisation_gap`). They are (4.12) and (4.13), Lemma 3 of D. Balboni,
*An Optimization Perspective on Deep Neural Networks*, PhD thesis, Scuola Normale Superiore, 2025,
section 4.5.

The hypotheses are strong: $\mu$ and $L$ must hold for almost every sample and wherever training may
go (a bounded region: PL makes the loss grow quadratically, which no Lipschitz function does). With
values measured on one sample at one point the bound is an estimate, not a theorem. For networks
$L^2 / \mu$ is large, and the bound often exceeds the largest possible loss: it is then
`Bound.vacuous`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

__all__ = [
    "Bound",
    "generalisation_bound",
    "generalisation_gap",
    "pointwise_hypothesis_stability",
]


class Bound(NamedTuple):
    """An upper bound of the expected loss.

    Attributes:
        value: The bound.
        vacuous: Whether ``value`` is at least the largest possible loss, so that it says nothing.
    """

    value: float
    vacuous: bool


def pointwise_hypothesis_stability(
    pl: float, lipschitz: float, examples: int, suboptimality: float = 0.0
) -> float:
    r"""How much the loss on a training example can change when that example is exchanged.

    $$
    \beta = 2 L \sqrt{\frac{2 \varepsilon}{\mu}} + \frac{2 L^2}{\mu (n - 1)} .
    $$

    Assumptions: $\ell(\cdot\,; z)$ is differentiable with $\|\nabla \ell\| \le L$; the empirical
    risk has minimisers and obeys $\|\nabla f\|^2 \ge 2 \mu (f - f^*)$, for the sample with and
    without the exchange; training ends at $f - f^* \le \varepsilon$. Then it also obeys quadratic
    growth, $f(w) - f^* \ge \frac{\mu}{2} \operatorname{dist}(w, \operatorname{argmin} f)^2$
    (Karimi et al.).

    Proof. Quadratic growth puts the trained $w$ within $\sqrt{2 \varepsilon / \mu}$ of a minimiser
    $w_S$, on either sample: the first term. For the second let $\Delta = |\ell(w_S; z_i) -
    \ell(w_{S'}; z_i)|$.

    - $S'$ without example $i$: optimality gives $\ell(w_S; z_i) \le \ell(w_{S'}; z_i)$, and
      $\Delta = n [f_S(w_{S'}) - f_S^*] + (n-1) [f_{S'}(w_S) - f_{S'}^*]$. Since
      $\nabla f_S(w_{S'}) = \nabla \ell(w_{S'}; z_i) / n$ and $\nabla f_{S'}(w_S) = -\nabla
      \ell(w_S; z_i) / (n-1)$, PL bounds the brackets by $L^2 / 2 \mu n^2$ and
      $L^2 / 2 \mu (n-1)^2$: in all $\Delta \le L^2 / \mu (n-1)$, half of the second term. Nothing
      is assumed of which minimiser training finds.
    - $S'$ with $z_i$ exchanged for another example, which `generalisation_bound` asks for:
      $\|\nabla f_S(w_{S'})\| \le 2 L / n$, so PL and quadratic growth put $w_{S'}$ within
      $2 L / \mu n$ of $\operatorname{argmin} f_S$. If $w_S$ is the nearest point there (as when the
      minimiser is unique), $\Delta \le 2 L^2 / \mu n$. Least squares with scattered targets attains
      this up to $O(1/n^2)$.

    Args:
        pl: ``μ``, not negative; 0 gives ``inf``.
        lipschitz: ``L`` of the loss of one example as a function of the parameters.
        examples: ``n``, at least 2.
        suboptimality: ``ε``, how far above its minimum training leaves the empirical risk.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If it is not a number.

    Source:
        Z. Charles, D. Papailiopoulos, *Stability and generalization of learning algorithms that
        converge to global optima*, ICML 2018. H. Karimi, J. Nutini, M. Schmidt, *Linear convergence
        of gradient and proximal-gradient methods under the Polyak-Łojasiewicz condition*, 2016.

    Examples:
        >>> pointwise_hypothesis_stability(pl=0.5, lipschitz=1.0, examples=101)
        0.04
    """
    pl = _number("pl", pl, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
    lipschitz = _number("lipschitz", lipschitz, "a number of at least 0", lambda x: x >= 0)
    _require_examples(examples)
    suboptimality = _number(
        "suboptimality", suboptimality, "a number of at least 0", lambda x: x >= 0
    )
    if lipschitz == 0:
        return 0.0
    if pl == 0:
        return math.inf
    distance = math.sqrt(2 * suboptimality / pl)
    return 2 * lipschitz * distance + 2 * lipschitz * lipschitz / (pl * (examples - 1))


def generalisation_bound(
    empirical_risk: float,
    stability: float,
    examples: int,
    max_loss: float,
    confidence: float = 0.95,
) -> Bound:
    r"""A bound of the expected loss that holds with probability ``confidence`` over the sample.

    $$
    R \le R_{\text{emp}} + \sqrt{\frac{M^2 + 12 M n \beta}{2 n \delta}}, \qquad
    \delta = 1 - \text{confidence}.
    $$

    Assumptions: the examples are independent and identically distributed, $0 \le \ell \le M$, and
    $\mathbb{E}\, |\ell(A_S; z_i) - \ell(A_{S^i}; z_i)| \le \beta$ for every $i$, where $A_S$ is
    what training makes of $S$, and $S^i$ has an independent example in place of $z_i$. (To leave
    $z_i$ out instead is not enough for an arbitrary algorithm.)

    Proof. $z_j, z$ and primes below are independent. Through a sample that contains $z$ instead,
    $\mathbb{E}|\ell(A_S; z) - \ell(A_{S^i}; z)| \le 2 \beta$ at a fresh $z$, and from there
    $\mathbb{E}|\ell(A_S; z_j) - \ell(A_{S^i}; z_j)| \le 4 \beta$ at $j \ne i$. Exchange $z_i$ and
    $z'$ in $T = \mathbb{E}[P (Q - V)]$, with $Q, V$ the losses at $z'$, $z_i$ and $P$ the loss at a
    third point: with $P', Q', V'$ after training on $S^i$,

    $$
    2 T = \mathbb{E}[P (Q - Q') + P' (V' - V) + (P - P') (Q' - V)]
    \le M (\beta + \beta + \mathbb{E} |P - P'|) .
    $$

    $P$ at a fresh point: $\mathbb{E}[R (R - R_{\text{emp}})] = T \le 2 M \beta$. $P$ at $z_j$, with
    the opposite sign: $\mathbb{E}[\ell_j (\ell_i - R)] \le 3 M \beta$, so that
    $\mathbb{E}[R_{\text{emp}} (R_{\text{emp}} - R)] \le 3 M \beta + \frac{1}{2n} \mathbb{E}[(\ell_i
    - \ell_j)^2]$. In all $\mathbb{E}(R - R_{\text{emp}})^2 \le \frac{M^2}{2n} + 5 M \beta$, and the
    bound, which has 6 in place of 5, follows by Chebyshev's inequality.

    Args:
        empirical_risk: ``R_emp``, the mean loss on the training set, in [0, ``max_loss``].
        stability: ``β``, such as `pointwise_hypothesis_stability`; ``inf`` is allowed.
        examples: ``n``, at least 2.
        max_loss: ``M``, the largest possible loss of one example.
        confidence: ``1 - δ``, between 0 and 1.

    Returns:
        The bound, and whether it is vacuous.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If it is not a number.

    Source:
        O. Bousquet, A. Elisseeff, *Stability and generalization*, JMLR 2, 2002, Theorem 11.

    Examples:
        >>> bound = generalisation_bound(0.1, 0.0, examples=1000, max_loss=1.0, confidence=0.95)
        >>> round(bound.value, 6), bound.vacuous
        (0.2, False)
        >>> generalisation_bound(0.1, 0.5, examples=1000, max_loss=1.0).vacuous
        True
    """
    M = _number("max_loss", max_loss, "a positive finite number", lambda x: 0 < x < math.inf)
    risk = _number(
        "empirical_risk",
        empirical_risk,
        f"a number between 0 and max_loss={M}",
        lambda x: 0 <= x <= M,
    )
    value = risk + generalisation_gap(stability, examples, max_loss, confidence)
    return Bound(value, value >= M)


def generalisation_gap(
    stability: float, examples: int, max_loss: float, confidence: float = 0.95
) -> float:
    r"""A bound of the distance between expected and empirical risk: (4.13) of the thesis.

    $$
    \sqrt{\frac{M^2 + 12 M n \beta}{2 n \delta}}, \qquad \delta = 1 - \text{confidence},
    $$

    with probability ``confidence`` over the sample. The proof is that of `generalisation_bound`:
    Chebyshev's inequality bounds $|R - R_{\text{emp}}|$, on both sides.

    Args:
        stability: See `generalisation_bound`.
        examples: See `generalisation_bound`.
        max_loss: See `generalisation_bound`. A gap of ``M`` or more says nothing.
        confidence: See `generalisation_bound`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If it is not a number.

    Source:
        Lemma 3 of D. Balboni, PhD thesis, SNS 2025, section 4.5.

    Examples:
        >>> round(generalisation_gap(0.0, examples=1000, max_loss=1.0, confidence=0.95), 6)
        0.1
    """
    M = _number("max_loss", max_loss, "a positive finite number", lambda x: 0 < x < math.inf)
    beta = _number("stability", stability, "a number of at least 0", lambda x: x >= 0)
    _require_examples(examples)
    confidence = _number(
        "confidence", confidence, "a number between 0 and 1, exclusive", lambda x: 0 < x < 1
    )
    return math.sqrt((M * M / (2 * examples) + 6 * M * beta) / (1 - confidence))


def _number(name: str, value: float, expected: str, valid: Callable[[float], bool]) -> float:
    """``value`` as a float (a 0-dim tensor is welcome), checked."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}={value!r}: expected {expected}") from error
    if not valid(number):
        raise ValueError(f"{name}={number!r}: expected {expected}")
    return number


def _require_examples(examples: int) -> None:
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 2:
        raise ValueError(f"examples={examples!r}: expected a whole number of at least 2")
