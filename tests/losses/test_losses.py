"""Loss Hessians against the dense Hessian of PyTorch's own losses, in float64."""

import copy
import itertools
import math
import pkgutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loops import NoSynchronisation
from torch import nn
from torch.utils import _pytree as pytree

from adler.losses import (
    AutogradHessian,
    EmpiricalFisher,
    LossHessian,
    loss_hessian,
    register,
)

# PyTorch warns of targets that broadcast against the outputs, which is here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")

REDUCTIONS = ["mean", "sum"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def uniform(*shape):
    return 0.05 + 0.9 * torch.rand(shape, dtype=torch.float64)


def counts(*shape):
    return (4 * uniform(*shape)).round()


# --- cases: name -> function of shape and reduction, which makes (criterion, outputs, targets) ----


def classification(loss, kind, weighted, **options):
    def make(shape, reduction):
        axis = min(1, len(shape) - 1)
        classes, positions = shape[axis], shape[:axis] + shape[axis + 1 :]
        ignored = {"ignored": -1, "ignored class": 1}.get(kind, -100)
        if kind == "probabilities":
            y = uniform(*shape)  # they need not sum to one: PyTorch does not ask
        else:
            y = torch.randint(classes, positions)
            y.view(-1)[0] = 0
            if kind.startswith("ignored"):
                y.view(-1)[1::2] = ignored
        weight = uniform(classes) if weighted else None
        criterion = loss(weight=weight, ignore_index=ignored, reduction=reduction, **options)
        return criterion, 2 * normal(*shape), y

    return make


def entrywise(loss, outputs, *targets, **options):
    """Options that are functions make a tensor along the last dimension."""

    def make(shape, reduction):
        made = {k: o(shape[-1]) if callable(o) else o for k, o in options.items()}
        several = tuple(t(*shape) for t in targets)
        y = several if len(several) > 1 else several[0]
        return loss(reduction=reduction, **made), outputs(*shape), y

    return make


CE, NLL, BCE = nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss
POISSON, GAUSSIAN = nn.PoissonNLLLoss, nn.GaussianNLLLoss
INDICES, WEIGHTED = ["index", "ignored", "ignored class"], [False, True]
CLASSIFICATION = {
    f"ce, {kind}, {weighted=}, {smoothing=}": classification(
        CE, kind, weighted, label_smoothing=smoothing
    )
    for kind, weighted, smoothing in itertools.product(
        [*INDICES, "probabilities"], WEIGHTED, [0.0, 0.3]
    )
} | {
    f"nll, {kind}, {weighted=}": classification(NLL, kind, weighted)
    for kind, weighted in itertools.product(INDICES, WEIGHTED)
}
ENTRYWISE = {
    "mse": entrywise(nn.MSELoss, normal, normal),
    "huber": entrywise(nn.HuberLoss, normal, normal, delta=1.5),
    "smooth l1": entrywise(nn.SmoothL1Loss, normal, normal, beta=1.5),
    "l1": entrywise(nn.SmoothL1Loss, normal, normal, beta=0.0),
    "bce": entrywise(BCE, normal, uniform),
    "bce, weight": entrywise(BCE, normal, uniform, weight=uniform),
    "bce, pos_weight": entrywise(BCE, normal, uniform, pos_weight=uniform),
    "bce, both": entrywise(BCE, normal, uniform, weight=uniform, pos_weight=uniform),
    "poisson": entrywise(POISSON, normal, counts),
    "poisson, full": entrywise(POISSON, normal, counts, full=True),
    "poisson, rates": entrywise(POISSON, uniform, counts, log_input=False, eps=0.1),
    "poisson, rates, full": entrywise(POISSON, uniform, counts, log_input=False, full=True),
}
BROADCAST = {  # of targets against outputs, or of several targets
    "mse, targets": entrywise(nn.MSELoss, normal, lambda *s: normal(1, *s[1:])),
    "mse, outputs": entrywise(nn.MSELoss, normal, lambda *s: normal(3, *s)),
    "huber, targets": entrywise(nn.HuberLoss, normal, lambda *s: normal(1, *s[1:])),
    "gaussian, scalar": entrywise(GAUSSIAN, normal, normal, lambda *s: 0.7),
    "gaussian, row": entrywise(GAUSSIAN, normal, normal, lambda *s: uniform(*s[:-1]), eps=0.3),
    "gaussian, column": entrywise(GAUSSIAN, normal, normal, lambda *s: uniform(*s[:-1], 1)),
    "gaussian, full": entrywise(GAUSSIAN, normal, normal, uniform, eps=0.3),
}
LOSSES = {**CLASSIFICATION, **ENTRYWISE, **BROADCAST}


class Problem:
    """A criterion at outputs ``F`` with tangents ``v``, both behind a log-softmax for NLL."""

    def __init__(self, name, reduction, shape, seed):
        torch.manual_seed(seed)
        self.criterion, self.z, self.y = LOSSES[name](shape, reduction)
        axis, nll = min(1, len(shape) - 1), isinstance(self.criterion, NLL)
        self.link = (lambda z: z.log_softmax(axis)) if nll else lambda z: z
        self.direction = normal(*shape)
        self.F, self.v = torch.autograd.functional.jvp(self.link, self.z, self.direction)

    def form(self, provider=loss_hessian, scale=1.0):
        return provider(self.criterion).quadratic_form(self.F, self.y, scale * self.v)

    def dense(self):
        y = self.y if isinstance(self.y, tuple) else (self.y,)
        hessian = torch.autograd.functional.hessian(
            lambda z: self.criterion(self.link(z), *y), self.z
        )
        d = self.direction.flatten()
        return d @ hessian.reshape(d.numel(), d.numel()) @ d


def map_floats(function, tree):
    return pytree.tree_map_only(
        torch.Tensor, lambda t: function(t) if t.is_floating_point() else t, tree
    )


def problems(name, sizes=(3, 4, 2, 2), seed=0):
    shapes = [sizes[1:2], sizes[:2], sizes[:3], sizes]  # unbatched; 0, 1, 2 extra dimensions
    for reduction, shape in itertools.product(REDUCTIONS, shapes):
        yield Problem(name, reduction, shape, seed)


def close(a, b, rtol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-3 * rtol)


every_loss = pytest.mark.parametrize("name", LOSSES)
some_shapes = given(
    sizes=st.tuples(*[st.integers(1, most) for most in (3, 4, 2, 2)]), seed=st.integers(0, 10**6)
)
few = settings(deadline=None, max_examples=3)


# --- closed forms and autograd --------------------------------------------------------------------


@every_loss
@some_shapes
@few
def test_quadratic_forms_equal_the_dense_hessian(name, sizes, seed):
    for problem in problems(name, sizes, seed):
        expected = problem.dense()
        assert type(loss_hessian(problem.criterion)) is not AutogradHessian
        for _ in range(2):  # twice: no hidden state
            close(problem.form(), expected)
        if not isinstance(problem.criterion, NLL):  # linear without its link
            close(problem.form(AutogradHessian), expected)


@every_loss
@some_shapes
@few
def test_quadratic_forms_of_convex_losses(name, sizes, seed):
    for problem in problems(name, sizes, seed):
        c = problem.form()
        assert c.ndim == 0
        assert c >= 0
        close(problem.form(scale=-3.0), 9 * c)
        assert problem.form(scale=0.0) == 0
        if problem.F.ndim > 1:  # in another order of the examples
            order = torch.randperm(b := problem.F.shape[0])
            F, y, v = pytree.tree_map_only(
                torch.Tensor,
                lambda t: t[order] if t.shape[0] == b else t,  # noqa: B023
                (problem.F, problem.y, problem.v),
            )
            close(loss_hessian(problem.criterion).quadratic_form(F, y, v), c)


def dense_hessian(problem):
    """Of the form itself, so that NLL has its Fisher information: polarised on the unit vectors."""
    hessian, F = loss_hessian(problem.criterion), problem.F
    basis = torch.eye(F.numel(), dtype=F.dtype).reshape(-1, *F.shape)

    def form(v):
        return hessian.quadratic_form(F, problem.y, v)

    rows = [[(form(a + b) - form(a - b)) / 4 for b in basis] for a in basis]
    return torch.stack([torch.stack(row) for row in rows])


@every_loss
@some_shapes
@few
def test_products_are_the_forms_polarised_and_norms_bound_them(name, sizes, seed):
    problem = Problem(name, "mean", sizes[:2], seed)
    hessian, Q = loss_hessian(problem.criterion), dense_hessian(problem)
    product = hessian.product(problem.F, problem.y, problem.v)
    close(product.flatten(), Q @ problem.v.flatten())
    largest = torch.linalg.eigvalsh(Q).abs().max()
    norm = hessian.spectral_norm(problem.F, problem.y)
    close(norm, largest)
    if not isinstance(problem.criterion, NLL):
        generic = AutogradHessian(problem.criterion)
        close(generic.product(problem.F, problem.y, problem.v), product)
        assert generic.spectral_norm(problem.F, problem.y) <= largest * (1 + 1e-9)


@every_loss
@some_shapes
@few
def test_mean_eigenvalues_are_those_of_the_dense_hessian(name, sizes, seed):
    for problem in problems(name, sizes, seed):
        hessian, Q = loss_hessian(problem.criterion), dense_hessian(problem)
        close(hessian.mean_eigenvalue(problem.F, problem.y), Q.trace() / len(Q))


def test_the_mean_eigenvalue_of_any_loss_is_estimated():
    def criterion(F, y):  # its Hessian is 2 A Aᵀ + 6 I: not diagonal
        return (F @ A - y).square().sum() + 3 * F.square().sum()

    for seed in range(3):
        torch.manual_seed(seed)
        A, F, y = normal(30, 30), normal(30), normal(30)
        exact = float(2 * A.square().sum() / 30 + 6)
        hessian = AutogradHessian(criterion)
        assert float(hessian.mean_eigenvalue(F, y)) == pytest.approx(exact, rel=0.2)
        assert hessian.mean_eigenvalue(F, y) == hessian.mean_eigenvalue(F, y)
    diagonal = AutogradHessian(lambda F, y: ((F - y) ** 4).sum())
    expected = 12 * (F - y).square().mean()
    close(diagonal.mean_eigenvalue(F, y), expected)


def test_the_mean_eigenvalue_holds_out_ignored_examples():
    F, y = normal(4, 3), torch.tensor([0, -100, 2, 1])
    F[1] = float("nan")
    hessian = loss_hessian(nn.CrossEntropyLoss())
    kept = [0, 2, 3]
    expected = hessian.mean_eigenvalue(F[kept], y[kept]) * 3 / 4  # its eigenvalues are zeros
    close(hessian.mean_eigenvalue(F, y), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 2, 10, 100])
def test_the_norm_of_cross_entropy_is_exact_for_any_distribution(classes, dtype):
    # In exact arithmetic never below: bisection keeps the upper end.
    slack = 4 * torch.finfo(dtype).eps
    for scale in (0.0, 1e-3, 0.1, 1.0, 5.0, 40.0):  # uniform to one-hot: ties and poles
        F = scale * torch.randn(20, classes, generator=torch.Generator().manual_seed(classes))
        p = F.double().softmax(1)
        matrices = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        exact = float(torch.linalg.eigvalsh(matrices)[:, -1].max()) / 20
        y = torch.zeros(20, dtype=torch.long)
        found = float(loss_hessian(nn.CrossEntropyLoss()).spectral_norm(F.to(dtype), y))
        assert exact - slack <= found <= exact + slack
    masked = torch.tensor([[0.3, 0.1, -math.inf]], dtype=dtype)
    pair = loss_hessian(nn.CrossEntropyLoss()).spectral_norm(masked[:, :2], y[:1])
    assert float(loss_hessian(nn.CrossEntropyLoss()).spectral_norm(masked, y[:1])) == pytest.approx(
        float(pair), rel=1e-6
    )


def test_power_iteration_finds_the_norm_of_any_loss():
    criterion, y = (lambda F, y: ((F - y).cosh() * torch.arange(1, 7).view(2, 3)).sum()), 0.0
    F = torch.zeros(2, 3, dtype=torch.float64)
    assert float(AutogradHessian(criterion).spectral_norm(F, y)) == pytest.approx(6.0, rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_loss
def test_every_dtype_is_as_accurate_as_float32(name, dtype):
    for problem in problems(name):
        F, y, v = map_floats(lambda t: t.to(dtype), (problem.F, problem.y, problem.v))
        criterion = copy.deepcopy(problem.criterion).to(dtype)
        rounded = map_floats(torch.Tensor.double, (F, y, v))
        for provider in (loss_hessian, AutogradHessian, EmpiricalFisher):
            c = provider(criterion).quadratic_form(F, y, v)
            assert c.dtype == torch.promote_types(dtype, torch.float32)
            exact = provider(copy.deepcopy(criterion).double()).quadratic_form(*rounded)
            close(c.double(), exact, rtol=1e-12 if dtype == torch.float64 else 1e-5)


# --- hard outputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in LOSSES if n.startswith(("ce", "nll", "bce"))])
def test_large_logits_are_finite_and_not_negative(name, dtype):
    for problem in problems(name):
        z = (problem.z / problem.z.abs().max() * 1e4).to(dtype)
        F, v = problem.link(z), problem.v.to(dtype)
        c = loss_hessian(problem.criterion).quadratic_form(F, problem.y, v)
        assert c.isfinite()
        assert c >= 0


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_common_shift_of_logits_or_of_tangents_changes_nothing(shift):
    problem = Problem("ce, index, weighted=False, smoothing=0.0", "mean", (3, 4), seed=0)
    expected = problem.form()
    problem.F, problem.v = problem.F + shift, problem.v + shift
    close(problem.form(), expected)
    problem.F, problem.v = problem.F.float(), problem.v.float()
    close(problem.form().double(), expected, rtol=1e-2)  # v² alone would cancel to noise


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tangent", [0.0, 5.0, float("nan")])
def test_classes_masked_by_infinity_are_absent(reduction, tangent):
    criterion, y = CE(reduction=reduction), torch.tensor([0, 1, 0])
    F, v = normal(3, 4), normal(3, 4)
    expected = loss_hessian(criterion).quadratic_form(F[:, :2], y, v[:, :2])
    F[:, 2:], v[:, 2:] = -torch.inf, tangent
    close(loss_hessian(criterion).quadratic_form(F, y, v), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("provider", [loss_hessian, EmpiricalFisher])
@pytest.mark.parametrize("name", [n for n in CLASSIFICATION if "ignored" in n])
def test_ignored_examples_may_be_anything(name, provider, bad):
    for problem in problems(name):
        expected, ignore = problem.form(provider), problem.criterion.ignore_index
        ignored = (problem.y == ignore).unsqueeze(min(1, problem.y.ndim))
        problem.F = problem.F.masked_fill(ignored, bad)
        problem.v = problem.v.masked_fill(ignored, bad)
        close(problem.form(provider), expected)
        problem.y = torch.full_like(problem.y, ignore)
        c = problem.form(provider)  # PyTorch's mean over no example is 0/0
        assert c == 0 or (c.isnan() and problem.criterion.reduction == "mean")


@pytest.mark.parametrize("weight", [None, uniform(4)])
def test_class_indices_may_be_bytes(weight):
    criterion, F, v = CE(weight=weight), normal(3, 4), normal(3, 4)
    y = torch.tensor([0, 3, 1])
    expected = loss_hessian(criterion).quadratic_form(F, y, v)
    close(loss_hessian(criterion).quadratic_form(F, y.byte(), v), expected)


@every_loss
def test_the_host_never_waits(name):
    for problem in problems(name):
        with NoSynchronisation():
            problem.form()
            if not isinstance(problem.criterion, GAUSSIAN):
                loss_hessian(problem.criterion).spectral_norm(problem.F, problem.y)
                loss_hessian(problem.criterion).mean_eigenvalue(problem.F, problem.y)
            if not isinstance(problem.criterion, GAUSSIAN):  # PyTorch looks at the variance
                problem.form(EmpiricalFisher)


# --- empirical Fisher -----------------------------------------------------------------------------


def fisher_by_loop(problem):
    """``Σ ω_i (∇ℓ_i·v_i)²``, one example at a time, with ``ω_i`` from PyTorch's documentation."""
    criterion, F, y, v = copy.deepcopy(problem.criterion), problem.F, problem.y, problem.v
    mean = criterion.reduction == "mean"
    if isinstance(criterion, CE | NLL):
        axis = min(1, F.ndim - 1)
        F, v = (t.movedim(axis, -1).reshape(-1, t.shape[axis]) for t in (F, v))
        C, smoothing = F.shape[1], getattr(criterion, "label_smoothing", 0.0)
        w = normal(C).fill_(1.0) if criterion.weight is None else criterion.weight
        if y.is_floating_point():
            y = y.movedim(axis, -1).reshape(-1, C)
            omega, total = [((1 - smoothing) * t + smoothing / C) @ w for t in y], len(y)
        else:
            y = y.flatten()
            kept = y != criterion.ignore_index
            F, y, v = F[kept], y[kept], v[kept]
            omega, total = (1 - smoothing) * w[y] + smoothing / C * w.sum(), w[y].sum()
        criterion.reduction = "sum"  # of one example: ω_i ℓ_i
    else:  # an example is a row, whose loss is the mean or sum over its entries
        omega, total = [1.0] * len(F), len(F)
    c = torch.zeros((), dtype=torch.float64)
    for F_i, y_i, v_i, omega_i in zip(F, y, v, omega):
        F_i = F_i.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(criterion(F_i, y_i), F_i)
        c += (gradient * v_i).sum().square() / omega_i
    return c / total if mean else c


@pytest.mark.parametrize("name", [*CLASSIFICATION, *ENTRYWISE])
@some_shapes
@few
def test_empirical_fisher_equals_a_loop_over_examples(name, sizes, seed):
    for problem in problems(name, sizes, seed):
        if isinstance(problem.criterion, BCE) and problem.F.ndim == 1:
            continue  # its weights run along the examples
        for _ in range(2):
            close(problem.form(EmpiricalFisher), fisher_by_loop(problem))


# --- any criterion --------------------------------------------------------------------------------


class LogCosh(nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        self.scale, self.reduction = nn.Parameter(torch.tensor(2.0)), reduction

    def forward(self, outputs, targets):
        return (self.scale * (outputs - targets)).cosh().log().mean()


LEARNED = LogCosh()


def noisy(outputs, targets):
    return (nn.functional.dropout(outputs) - torch.rand_like(targets)).square().sum()


# name: (criterion, its second derivative in F at target y)
FUNCTIONS = {
    "module": (LEARNED, lambda F, y: 4 / (2 * (F - y)).cosh().square() / F.numel()),
    "function": (lambda F, y: (F - y).pow(4).sum(), lambda F, y: 12 * (F - y).square()),
    "linear": (lambda F, y: (F * y).sum(), lambda F, y: 0 * F),
    "piecewise linear": (nn.L1Loss(), lambda F, y: 0 * F),
    "concave": (lambda F, y: -(F * F).sum(), lambda F, y: 0 * F - 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("graph", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("case", FUNCTIONS)
def test_any_criterion_is_differentiated(case, graph, dtype):
    torch.manual_seed(0)
    criterion, second = FUNCTIONS[case]
    F, y, v = (normal(3, 2).to(dtype) for _ in range(3))
    with graph():
        c = loss_hessian(criterion).quadratic_form(F, y, v)
    assert c.dtype == torch.promote_types(dtype, torch.float32)
    F, y, v = F.double(), y.double(), v.double()
    close(c.double(), (second(F, y) * v.square()).sum(), rtol=1e-5)


@pytest.mark.parametrize("provider", [AutogradHessian, EmpiricalFisher])
@pytest.mark.parametrize("criterion", [LEARNED, noisy])
def test_nothing_is_left_behind(provider, criterion):
    leaf, targets = normal(3, 2).requires_grad_(), normal(3, 2).requires_grad_()
    outputs, state = 2 * leaf, torch.get_rng_state()
    outputs.retain_grad()
    c = provider(criterion).quadratic_form(outputs, targets, torch.ones_like(outputs))
    assert torch.get_rng_state().equal(state)
    assert not c.requires_grad
    assert all(t.grad is None for t in [leaf, outputs, targets, LEARNED.scale])
    assert outputs.equal(2 * leaf)


def test_what_is_no_loss_is_refused():
    F, v = normal(3, 2), normal(3, 2)
    with pytest.raises(ValueError, match=r"shape \(3, 2\), not a scalar: use reduction='mean'"):
        loss_hessian(lambda F, y: (F - y).square()).quadratic_form(F, F, v)
    with pytest.raises(ValueError, match="does not depend on the outputs"):
        loss_hessian(lambda F, y: y.sum()).quadratic_form(F, F, v)


# --- the registry ---------------------------------------------------------------------------------


class Tripled(LossHessian):
    def quadratic_form(self, outputs, targets, tangents):
        return 3 * tangents.square().sum()


class Inherits(nn.MSELoss):
    pass


class Overrides(nn.MSELoss):
    def forward(self, input, target):
        return super().forward(input, target).exp()


@pytest.fixture
def registry(monkeypatch):
    providers = "adler.losses.registry._providers"
    monkeypatch.setattr(providers, dict(pkgutil.resolve_name(providers)))


PROVIDERS = {
    "class": Tripled,
    "function": lambda criterion: Tripled(criterion),
    "instance": Tripled(LogCosh()),
}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("loss", [LogCosh, nn.MSELoss, Overrides])
@pytest.mark.parametrize("kind", PROVIDERS)
def test_registered_providers_are_used(kind, loss):
    register(loss, PROVIDERS[kind])
    found = loss_hessian(loss())
    assert type(found) is Tripled
    assert found.quadratic_form(None, None, torch.ones(2)) == 6
    assert loss_hessian(found) is found
    with pytest.raises(ValueError, match="use reduction='mean' or 'sum'"):
        loss_hessian(loss(reduction="none"))


def test_a_closed_form_holds_for_subclasses_with_the_same_forward():
    problem = Problem("mse", "mean", (3, 2), seed=0)
    expected = {Inherits(): type(loss_hessian(nn.MSELoss())), Overrides(): AutogradHessian}
    for criterion, provider in expected.items():
        assert type(loss_hessian(criterion)) is provider
        problem.criterion = criterion
        close(problem.form(), problem.dense())


@pytest.mark.usefixtures("registry")
def test_wrong_kinds_are_refused():
    with pytest.raises(TypeError, match=r"loss_class: expected a class, got LogCosh\("):
        register(LogCosh(), Tripled)
    with pytest.raises(TypeError, match=r"provider: .*got 3"):
        register(LogCosh, 3)
    with pytest.raises(TypeError, match="criterion: expected a loss, got str"):
        loss_hessian("mse")
    register(LogCosh, lambda criterion: criterion)
    with pytest.raises(TypeError, match="registered for LogCosh made LogCosh, not a LossHessian"):
        loss_hessian(LogCosh())


@pytest.mark.parametrize("provider", [loss_hessian, AutogradHessian, EmpiricalFisher])
@every_loss
def test_unreduced_losses_are_refused_with_advice(name, provider):
    criterion, _, _ = LOSSES[name]((3, 2), "none")
    with pytest.raises(ValueError, match=r"reduction='none' .* use reduction='mean' or 'sum'"):
        provider(criterion)
