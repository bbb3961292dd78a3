"""A bound objective against dense matrices, and that nothing is kept between two questions."""

import pytest
import torch
from support.cases import CRITERIA, NETWORKS, batches, network
from support.loops import unchanged
from support.reference import Dense
from torch import nn
from torch.autograd.functional import hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from adler import curvature
from adler.curvature import Objective
from adler.curvature.parameters import flattened, unflatten


@pytest.fixture(autouse=True)
def _attention_that_can_be_differentiated_twice():
    # For the dense references; the library sees to it itself.
    with sdpa_kernel(SDPBackend.MATH):
        yield


def setting(name, criterion_name="ce-mean"):
    model, criterion = network(name), CRITERIA[criterion_name]()
    ((x, y),) = batches(name, criterion, 1)
    generator = torch.Generator().manual_seed(7)
    size = sum(p.numel() for p in model.parameters())
    d = torch.randn(size, generator=generator, dtype=torch.float64)
    return Objective(model, x, y, criterion), Dense(model, criterion), d


def flat(direction):
    return torch.cat([d.flatten() for d in direction.values()])


def check(h, dense, d):
    """Everything an objective says, against matrices."""
    theta, x, y = dense.flat(), h.inputs, h.targets
    J, Q = dense.jacobian(theta, x), dense.loss_hessian(theta, x, y)
    H = hessian(lambda t: dense.criterion(dense.outputs(t, x), y), theta)
    direction, close = unflatten(d, h.params), {"rtol": 1e-9, "atol": 1e-11}
    with unchanged(h.model):
        loss, gradient = h.loss_and_gradient()
        outputs, tangents = h.jvp(direction)
        found = {
            "loss": (loss, dense.criterion(dense.outputs(theta, x), y)),
            "same loss": (h.loss(), loss),
            "gradient": (flat(gradient), dense.gradient(theta, x, y)),
            "outputs": (outputs, dense.outputs(theta, x)),
            "tangents": (tangents.flatten(), J @ d),
            "form": (h.quadratic_form(direction), d @ J.T @ Q @ J @ d),
            "ggn": (flat(h.ggn(direction)), J.T @ Q @ J @ d),
            "hessian": (flat(h.hessian(direction)), H @ d),
            "tangent kernel": (h.tangent_kernel().to_dense(), J @ J.T),
        }
    assert not loss.requires_grad
    for name, (a, b) in found.items():
        torch.testing.assert_close(a, b.to(a), **close, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_answer_is_that_of_dense_matrices(name, criterion_name):
    check(*setting(name, criterion_name))


def test_the_answers_are_those_at_the_parameters_of_now():
    h, dense, d = setting("mlp-tanh")
    check(h, dense, d)
    with torch.no_grad():
        for p in h.params.values():
            p.add_(torch.randn_like(p), alpha=0.3)
    check(h, dense, d)


def test_several_products_share_a_graph_and_nothing_else():
    h, dense, d = setting("cnn")
    theta = dense.flat()
    J, Q = dense.jacobian(theta, h.inputs), dense.loss_hessian(theta, h.inputs, h.targets)
    ggn, curved = flattened(h.ggn_products(), h.params), flattened(h.hessian_products(), h.params)
    for v in (d, -2 * d, torch.ones_like(d)):
        torch.testing.assert_close(ggn(v), J.T @ Q @ J @ v, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(curved(v), flat(h.hessian(unflatten(v, h.params))))


def test_other_values_of_the_parameters():
    h, dense, d = setting("mlp-relu")
    theta = dense.flat() + 0.1 * d
    moved = unflatten(theta, h.params)
    expected = dense.criterion(dense.outputs(theta, h.inputs), h.targets)
    torch.testing.assert_close(h.loss(moved), expected)
    torch.testing.assert_close(h.outputs(moved), dense.outputs(theta, h.inputs))
    assert h.loss() != h.loss(moved)


def test_parameters_that_need_no_gradient_are_constants():
    h, _, _ = setting("mlp-tanh")
    h.model[0].weight.requires_grad_(False)
    part = Objective(h.model, h.inputs, h.targets, nn.CrossEntropyLoss())
    assert list(part.params) == ["0.bias", "2.weight", "2.bias"]
    gradient = h.gradient()
    assert part.gradient().keys() == part.params.keys()
    for name, g in part.gradient().items():
        torch.testing.assert_close(g, gradient[name])


def test_functions_are_single_questions_to_an_objective():
    h, _, d = setting("mlp-tanh")
    direction = unflatten(d, h.params)
    shared = (h.model, h.params, h.inputs, h.targets, nn.CrossEntropyLoss(), direction)
    for jvp in curvature.ENGINES:
        form = curvature.quadratic_form(*shared, jvp)
        torch.testing.assert_close(form, h.quadratic_form(direction, jvp), rtol=0, atol=0)
        product = curvature.ggn_product(*shared, jvp)
        torch.testing.assert_close(product, h.ggn(direction, jvp), rtol=0, atol=0)


def test_bad_input_is_named():
    h, _, _ = setting("mlp-tanh")
    batch = (h.model, h.inputs, h.targets)
    with pytest.raises(ValueError, match="reduction='none'"):
        Objective(*batch, nn.CrossEntropyLoss(reduction="none"))
    unreduced = Objective(*batch, lambda F, y: nn.functional.cross_entropy(F, y, reduction="none"))
    with pytest.raises(ValueError, match=r"criterion: it returned shape \(6,\), not a scalar"):
        unreduced.gradient()
    with pytest.raises(ValueError, match=r"params: entries \[0\] are not parameters"):
        Objective(*batch, nn.CrossEntropyLoss(), [torch.zeros(3)])
    with pytest.raises(ValueError, match="jvp='sideways'"):
        h.quadratic_form(h.params, "sideways")
