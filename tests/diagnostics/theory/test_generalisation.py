import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adler.diagnostics.theory.generalisation import (
    Bound,
    generalisation_bound,
    generalisation_gap,
    pointwise_hypothesis_stability,
)

examples = settings(deadline=None, max_examples=60, derandomize=True)
seeds = st.integers(0, 10**6)
positive = st.floats(-3, 3).map(lambda e: 10**e)


# --- least squares, where everything is known -----------------------------------------------------


class LeastSquares:
    """``f(w) = mean ½ (x·w - y)² + ½ λ ‖w‖²``, its minimiser and its constants."""

    def __init__(self, x, y, ridge):
        self.x, self.y, self.ridge = x, y, ridge
        eye = torch.eye(x.shape[1], dtype=x.dtype)
        self.hessian = x.T @ x / len(x) + ridge * eye
        self.minimiser = torch.linalg.pinv(self.hessian, hermitian=True) @ (x.T @ y / len(x))

    def loss(self, w, x, y):
        return (x @ w - y).square() / 2 + self.ridge * (w @ w) / 2

    def risk(self, w):
        return self.loss(w, self.x, self.y).mean()

    def gradient_norm(self, w, x, y):
        """Of one example's loss."""
        return float((x * (x @ w - y) + self.ridge * w).norm())

    @property
    def pl(self):
        """The smallest eigenvalue of the Hessian that is not 0."""
        values = torch.linalg.eigvalsh(self.hessian)
        return float(values[values > 1e-10 * values[-1]][0])

    def near(self, suboptimality, generator):
        """A point of this excess risk."""
        step = torch.randn(len(self.minimiser), generator=generator, dtype=torch.float64)
        excess = float(step @ self.hessian @ step) / 2
        return self.minimiser + step * math.sqrt(suboptimality / excess)


def data(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, generator=generator, dtype=torch.float64), generator


def lipschitz(problem, points, x, y):
    """The gradient is affine in w: its norm is largest at a corner of the hull of the points."""
    return max(problem.gradient_norm(w, *z) for w in points for z in zip(x, y))


@examples
@given(
    n=st.integers(2, 12),
    d=st.integers(1, 4),
    seed=seeds,
    ridge=st.floats(0.01, 3),
    suboptimality=st.sampled_from([0.0, 1e-4, 0.1]),
)
def test_least_squares_is_as_stable_as_claimed(n, d, seed, ridge, suboptimality):
    x, y, generator = data(n + 1, d, seed)
    exchanged = [n, *range(1, n)]
    before = LeastSquares(x[:n], y[:n], ridge)
    after = LeastSquares(x[exchanged], y[exchanged], ridge)
    w, w2 = before.near(suboptimality, generator), after.near(suboptimality, generator)
    L = lipschitz(before, [w, w2, before.minimiser, after.minimiser], x, y)
    bound = pointwise_hypothesis_stability(min(before.pl, after.pl), L, n, suboptimality)
    change = float((before.loss(w, x[0], y[0]) - before.loss(w2, x[0], y[0])).abs())
    assert change <= bound * (1 + 1e-9)


@examples
@given(n=st.integers(2, 8), d=st.integers(1, 12), seed=seeds, ridge=st.sampled_from([0.0, 0.1]))
def test_half_of_the_second_term_suffices_where_an_example_is_left_out(n, d, seed, ridge):
    # Without ridge and with n < d the minimisers are many, and each training may find another.
    x, y, generator = data(n, d, seed)
    all_of_them, rest = LeastSquares(x, y, ridge), LeastSquares(x[1:], y[1:], ridge)
    points = []
    for problem in (all_of_them, rest):
        values, vectors = torch.linalg.eigh(problem.hessian)
        null = vectors[:, values < 1e-10 * values[-1]]
        shift = torch.randn(null.shape[1], generator=generator, dtype=torch.float64)
        points.append(problem.minimiser + null @ shift)
    w, w2 = points
    # The proof needs the gradients of the example left out, at the two minimisers.
    L = lipschitz(all_of_them, points, x[:1], y[:1])
    bound = pointwise_hypothesis_stability(min(all_of_them.pl, rest.pl), L, n)
    change = float(rest.loss(w2, x[0], y[0]) - rest.loss(w, x[0], y[0]))
    assert -1e-9 <= change <= bound / 2 * (1 + 1e-9) + 1e-12


def test_scattered_targets_attain_the_second_term():
    # Targets ±1 in equal numbers but for one, which is exchanged; the model is their mean.
    n = 201
    x, y = torch.ones(n, 1, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    y[1::2] = -1
    before, after = LeastSquares(x, y, 0.0), LeastSquares(x, torch.cat([-y[:1], y[1:]]), 0.0)
    points = [before.minimiser, after.minimiser]
    L = lipschitz(before, points, x, y)
    bound = pointwise_hypothesis_stability(1.0, L, n)
    change = abs(float(before.loss(points[0], x[0], y[0]) - before.loss(points[1], x[0], y[0])))
    assert 0.97 * bound < change <= bound
    # and half of it where the example is left out
    rest = LeastSquares(x[1:], y[1:], 0.0)
    L = lipschitz(before, [before.minimiser, rest.minimiser], x[:1], y[:1])
    change = abs(
        float(before.loss(before.minimiser, x[0], y[0]) - before.loss(rest.minimiser, x[0], y[0]))
    )
    half = pointwise_hypothesis_stability(1.0, L, n) / 2
    assert 0.97 * half < change <= half


def test_opposite_errors_attain_the_first_term():
    # Many equal targets: an exchange changes nothing, but training stops on either side.
    x, y = torch.ones(10**6, 1, dtype=torch.float64), torch.ones(10**6, dtype=torch.float64)
    problem, offset, shift = LeastSquares(x, y - 1, 0.0), 1.0, 1e-3
    excess = shift**2 / 2
    w = [problem.minimiser + s * shift for s in (1, -1)]
    # a sample far from the fit, whose loss is nearly linear in w
    far = x[0], torch.tensor(offset, dtype=torch.float64)
    change = abs(float(problem.loss(w[0], *far) - problem.loss(w[1], *far)))
    L = max(problem.gradient_norm(p, *far) for p in w)
    bound = pointwise_hypothesis_stability(1.0, L, len(x), excess)
    assert 0.99 * bound < change <= bound


# --- the bound ------------------------------------------------------------------------------------

POINTS = [
    (torch.tensor(p, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    for p, y in itertools.product([(0.6, 0.8), (0.8, -0.6), (-1.0, 0.0)], [-1.0, 1.0])
]


def test_ridge_regression_stays_below_a_bound_that_is_not_vacuous():
    # Six points of unit norm, drawn with unequal probabilities: the expected loss is a finite sum.
    n, ridge, confidence, repeats = 100_000, 1.0, 0.95, 200
    x, y = torch.stack([p for p, _ in POINTS]), torch.stack([t for _, t in POINTS])
    probability = torch.tensor([0.3, 0.05, 0.2, 0.1, 0.25, 0.1], dtype=torch.float64)
    # f(0) ≤ ½ bounds the norm of every minimiser by 1, so that:
    L, M = 2 + ridge, 2 + ridge / 2
    stability = pointwise_hypothesis_stability(ridge, L, n)
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(repeats):
        drawn = torch.multinomial(probability, n, replacement=True, generator=generator)
        share = torch.bincount(drawn, minlength=len(x)).double() / n
        hessian = (x.T * share) @ x + ridge * torch.eye(2, dtype=torch.float64)
        w = torch.linalg.solve(hessian, x.T @ (share * y))
        losses = (x @ w - y).square() / 2 + ridge * (w @ w) / 2
        assert float(w.norm()) <= 1
        empirical, expected = float(share @ losses), float(probability @ losses)
        bound = generalisation_bound(empirical, stability, n, M, confidence)
        assert not bound.vacuous
        assert expected <= bound.value
        gaps.append(expected - empirical)
    assert max(gaps) > 0  # the empirical risk alone is no bound
    # What the proof bounds, before Chebyshev's inequality:
    second_moment = sum(gap**2 for gap in gaps) / repeats
    assert second_moment <= M**2 / (2 * n) + 5 * M * stability


@examples
@given(
    risk=st.floats(0, 1),
    beta=st.floats(0, 1),
    n=st.integers(2, 10**6),
    M=st.floats(1, 10),
    confidence=st.floats(0.01, 0.99),
)
def test_the_bound_is_that_of_theorem_11(risk, beta, n, M, confidence):
    delta = 1 - confidence
    expected = risk + math.sqrt((M**2 + 12 * M * n * beta) / (2 * n * delta))
    found = generalisation_bound(risk, beta, n, M, confidence)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.vacuous == (found.value >= M)


@examples
@given(beta=st.floats(0, 10), n=st.integers(2, 10**6), M=positive, confidence=st.floats(0.01, 0.99))
def test_the_gap_is_that_of_equation_4_13(beta, n, M, confidence):
    gap = generalisation_gap(beta, n, M, confidence)
    delta = 1 - confidence
    assert gap == pytest.approx(math.sqrt((M**2 + 12 * M * n * beta) / (2 * n * delta)), rel=1e-9)
    assert generalisation_bound(0.0, beta, n, M, confidence).value == pytest.approx(gap, rel=1e-12)


def test_the_gap_holds_on_both_sides_for_a_mean_and_a_tenth_of_it_does_not():
    # What is trained does not depend on the sample: β = 0, and the loss is a fair coin's.
    n, confidence = 25, 0.5
    gap = generalisation_gap(0.0, n, 1.0, confidence)
    generator = torch.Generator().manual_seed(0)
    risks = torch.randint(2, (4000, n), generator=generator).double().mean(1)
    far = (risks - 0.5).abs()
    assert float((far <= gap).double().mean()) >= confidence
    assert float((risks - 0.5 > gap / 10).double().mean()) > 1 - confidence - 0.1
    assert float((far <= gap / 10).double().mean()) < confidence


def test_a_memoriser_has_a_vacuous_bound():
    # No loss on the training set, the largest elsewhere: exchanging an example changes its loss
    # from 0 to 1. Without that term the bound would be 0.14 and false: the expected loss is 1.
    assert generalisation_bound(0.0, 1.0, 1000, 1.0) == Bound(
        pytest.approx(math.sqrt((1 / 2000 + 6) / 0.05)), True
    )
    assert generalisation_bound(0.0, 0.0, 1000, 1.0).value < 1


def test_leaving_an_example_out_is_not_the_stability_that_the_bound_needs():
    # An algorithm that memorises samples of even size, and is right everywhere on odd ones.
    def loss(sample, z):
        return 0.0 if len(sample) % 2 or z in sample else 1.0

    sample, fresh = list(range(1000)), 1000
    for i in (0, 500, 999):
        without = sample[:i] + sample[i + 1 :]
        exchanged = [*without, fresh]
        assert abs(loss(sample, i) - loss(without, i)) == 0
        assert abs(loss(sample, i) - loss(exchanged, i)) == 1
    assert loss(sample, fresh) == 1 > generalisation_bound(0.0, 0.0, 1000, 1.0).value


# --- rates and monotonicity -----------------------------------------------------------------------


def test_the_rate_in_the_number_of_examples():
    stabilities = [pointwise_hypothesis_stability(0.1, 2.0, n + 1) for n in (10, 1000)]
    assert stabilities[0] / stabilities[1] == pytest.approx(100)
    values = []
    for n in (10**5, 10**7):
        beta = pointwise_hypothesis_stability(0.1, 2.0, n)
        values.append(generalisation_bound(0.0, beta, n, 1.0).value)
    slope = math.log(values[1] / values[0]) / math.log(100)
    assert slope == pytest.approx(-0.5, abs=1e-4)


@examples
@given(
    pl=positive,
    L=positive,
    n=st.integers(2, 10**6),
    eps=positive,
    more=st.floats(1.01, 10),
)
def test_stability_is_monotone(pl, L, n, eps, more):
    at = pointwise_hypothesis_stability(pl, L, n, eps)
    assert pointwise_hypothesis_stability(more * pl, L, n, eps) < at
    assert pointwise_hypothesis_stability(pl, more * L, n, eps) > at
    assert pointwise_hypothesis_stability(pl, L, 2 * n, eps) < at
    assert pointwise_hypothesis_stability(pl, L, n, more * eps) > at
    # μ → t μ, L → t L, ε → t ε: the units of the loss
    scaled = pointwise_hypothesis_stability(more * pl, more * L, n, more * eps)
    assert scaled == pytest.approx(more * at, rel=1e-12)


@examples
@given(
    risk=st.floats(0, 0.5),
    beta=positive,
    n=st.integers(2, 10**6),
    M=st.floats(1, 10),
    confidence=st.floats(0.01, 0.9),
    more=st.floats(1.01, 1.09),
)
def test_the_bound_is_monotone(risk, beta, n, M, confidence, more):
    at = generalisation_bound(risk, beta, n, M, confidence).value
    assert generalisation_bound(risk + 0.1, beta, n, M, confidence).value > at
    assert generalisation_bound(risk, more * beta, n, M, confidence).value > at
    assert generalisation_bound(risk, beta, 2 * n, M, confidence).value < at
    assert generalisation_bound(risk, beta, n, more * M, confidence).value > at
    assert generalisation_bound(risk, beta, n, M, more * confidence).value > at


# --- the ends of the ranges -----------------------------------------------------------------------


def test_a_singular_kernel_promises_nothing():
    assert pointwise_hypothesis_stability(0.0, 1.0, 10) == math.inf
    assert pointwise_hypothesis_stability(1.0, 1e200, 10) == math.inf
    assert pointwise_hypothesis_stability(0.0, 0.0, 10) == 0  # a loss that never changes
    assert generalisation_bound(0.0, math.inf, 10, 1.0) == (math.inf, True)


def test_tensors_are_welcome():
    pl, L = torch.tensor(0.5), torch.tensor(1.0)
    assert pointwise_hypothesis_stability(pl, L, 101) == pytest.approx(0.04)
    bound = generalisation_bound(torch.tensor(0.25), 0.0, 1000, 1.0)
    assert isinstance(bound.value, float)
    assert bound.value == pytest.approx(0.35)


def test_bad_arguments_are_named():
    for name, value in [
        ("pl", -1.0),
        ("pl", math.inf),
        ("lipschitz", -1.0),
        ("lipschitz", math.nan),
        ("suboptimality", -0.1),
        ("examples", 1),
        ("examples", 10.0),
    ]:
        arguments = {"pl": 1.0, "lipschitz": 1.0, "examples": 10, name: value}
        with pytest.raises(ValueError, match=f"{name}={value!r}: expected"):
            pointwise_hypothesis_stability(**arguments)
    for name, value in [
        ("empirical_risk", -0.1),
        ("empirical_risk", 1.5),
        ("stability", -1.0),
        ("stability", math.nan),
        ("examples", True),
        ("max_loss", 0.0),
        ("max_loss", math.inf),
        ("confidence", 1.0),
        ("confidence", 0.0),
    ]:
        arguments = {"empirical_risk": 0.0, "stability": 0.1, "examples": 10, "max_loss": 1.0}
        with pytest.raises(ValueError, match=f"{name}={value!r}: expected"):
            generalisation_bound(**{**arguments, name: value})
    with pytest.raises(TypeError, match="pl=None: expected a finite number"):
        pointwise_hypothesis_stability(None, 1.0, 10)
