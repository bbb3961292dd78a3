"""The report against its parts, computed otherwise, in float64."""

import math
import sys

import pytest
import torch
from support.cases import CRITERIA, batches, network
from support.loops import unchanged
from support.reference import Dense
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adler import Adler, diagnostics
from adler.curvature import Objective
from adler.diagnostics.reports import Monitor, Report, report
from adler.diagnostics.snapshots import snapshot


@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", ["mlp-tanh", "batchnorm", "transformer"])
def test_a_snapshot_is_what_dense_matrices_say(name, criterion_name):
    model, criterion = network(name), CRITERIA[criterion_name]()
    ((x, y),) = batches(name, criterion, 1)
    with unchanged(model):
        found = snapshot(Objective(model, x, y, criterion), step=3)
    dense = Dense(model, criterion)
    theta = dense.flat()

    def h(at):
        return criterion(dense.outputs(at, x), y)

    loss, g = float(h(theta)), torch.autograd.functional.jacobian(h, theta)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        hessian = torch.autograd.functional.hessian(h, theta)
    J, Q = dense.jacobian(theta, x), dense.loss_hessian(theta, x, y)
    G, K = J.T @ Q @ J, J @ J.T
    top = float(torch.linalg.eigvalsh(G)[-1])
    close = {"rel": 1e-6, "abs": 1e-12}
    assert (found.step, found.examples) == (3, 6)
    assert found.loss == pytest.approx(loss, **close)
    assert found.squared_norm == pytest.approx(float(g @ g), **close)
    assert found.pl == pytest.approx(float(g @ g) / (2 * loss), **close)
    assert found.smoothness == pytest.approx(top, rel=1e-4)
    rate = float(g @ g / (g @ G @ g))
    assert found.minibatch_lr == pytest.approx(rate, rel=1e-6)
    assert found.decrease == pytest.approx(1 - found.pl / top, rel=1e-3)
    after = float(h(theta - g / top)) / loss
    assert found.measured_decrease == pytest.approx(after, rel=1e-3)
    kept, total = float(g @ G @ g), float(g @ hessian @ g)
    expected = abs(kept) / (abs(kept) + abs(total - kept))
    assert found.trust_gradient == pytest.approx(expected, rel=1e-6)
    assert 0 <= found.trust_random <= 1
    lengths = [0.25 * i * rate for i in range(11)]
    assert found.curve == pytest.approx([float(h(theta - t * g)) for t in lengths], rel=1e-5)
    assert found.model == pytest.approx(
        [loss - t * float(g @ g) + t * t * kept / 2 for t in lengths], rel=1e-5
    )
    assert min(found.model) == found.model[4]  # at one minibatch rate
    torch.testing.assert_close(
        torch.tensor(found.spectrum, dtype=K.dtype),
        torch.linalg.eigvalsh(K),
        rtol=1e-7,
        atol=1e-9,
    )


def test_the_predicted_decrease_bounds_the_measured_one_on_a_linear_model():
    # A quadratic loss: μ = ‖g‖²/2h and L = λ_max(H) make it a theorem.
    model, criterion = network("linear"), nn.MSELoss()
    for x, y in batches("linear", criterion, 4):
        found = snapshot(Objective(model, x, y, criterion))
        assert found.measured_decrease <= found.decrease + 1e-6
        assert found.trust_gradient == pytest.approx(1.0, abs=1e-12)
        assert found.trust_random == pytest.approx(1.0, abs=1e-12)


def test_a_report_holds_the_first_minibatches_and_their_table():
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    data = batches("mlp-tanh", criterion, 6)
    found = report(model, criterion, iter(data), batches=3)
    assert [s.step for s in found.snapshots] == [0, 1, 2]
    alone = snapshot(Objective(model, *data[1], criterion), step=1)
    assert found.snapshots[1] == alone
    rows = {r.split("|")[1].strip(): r.split("|")[2:5] for r in found.table().splitlines()[2:]}
    losses = sorted(s.loss for s in found.snapshots)
    cells = [float(cell) for cell in rows["loss h"]]
    assert cells == pytest.approx([losses[1], losses[0], losses[2]], rel=5e-3)
    assert len(report(model, criterion, data, batches=100, progress=True).snapshots) == 6


def test_a_monitor_looks_when_it_is_its_turn_and_disturbs_nothing():
    def trained(every):
        model, criterion = network("batchnorm"), nn.CrossEntropyLoss()
        optimizer = Adler(model.parameters(), model, criterion)
        monitor = Monitor(model, criterion, every=every) if every else None
        for x, y in batches("batchnorm", criterion, 7):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            if monitor:
                monitor(x, y)  # between backward and step: the worst place
            optimizer.step()
        return monitor, [t.clone() for t in model.state_dict().values()]

    monitor, watched = trained(3)
    _, alone = trained(None)
    assert all(a.equal(b) for a, b in zip(watched, alone))
    assert [s.step for s in monitor.snapshots] == [0, 3, 6]
    assert isinstance(monitor.report(), Report)


def test_the_kernel_takes_the_examples_that_fit():
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(50, 4, dtype=torch.float64), torch.randint(3, (50,))
    assert len(snapshot(Objective(model, x, y, criterion)).spectrum) == 150
    few = snapshot(Objective(model, x, y, criterion), max_bytes=60 * 60 * 8)
    assert len(few.spectrum) == 60
    expected = diagnostics.TangentKernel(model, x[:20]).eigenvalues()
    torch.testing.assert_close(torch.tensor(few.spectrum, dtype=x.dtype), expected)


def test_models_with_several_inputs_and_other_outputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x, *, scale):
            return {"out": self.inner(x) * scale}

    torch.manual_seed(0)
    model, x, y = Pair(), torch.randn(5, 4), torch.randint(3, (5,))
    inputs = {"x": x, "scale": torch.ones(5, 1)}
    found = report(model, nn.CrossEntropyLoss(), [(inputs, y)], output_fn=lambda out: out["out"])
    plain = report(model.inner, nn.CrossEntropyLoss(), [(x, y)])
    assert found.snapshots[0].loss == pytest.approx(plain.snapshots[0].loss)
    assert found.snapshots[0].spectrum == pytest.approx(plain.snapshots[0].spectrum, abs=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_the_picture_has_six_labelled_panels(count, tmp_path):
    model, criterion = network("mlp-relu"), nn.CrossEntropyLoss()
    found = report(model, criterion, batches("mlp-relu", criterion, 3), batches=count)
    figure = found.plot()
    assert len(figure.axes) == 6
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.get_legend() is not None
        assert all(len(line.get_xdata()) for line in axes.get_lines())
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_a_fitted_batch_is_no_error(tmp_path):
    model, criterion = nn.Linear(2, 1).double(), nn.MSELoss()
    x = torch.randn(4, 2, dtype=torch.float64)
    found = snapshot(Objective(model, x, model(x).detach(), criterion))
    assert found.loss == 0
    assert math.isnan(found.measured_decrease)
    Report((found,)).plot().savefig(tmp_path / "fitted.png")
    assert "| loss h | 0 | 0 | 0 |" in Report((found,)).table()


def test_bad_input_is_named(monkeypatch):
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    ((x, y),) = batches("mlp-tanh", criterion, 1)
    with pytest.raises(ValueError, match="loader: it is empty"):
        report(model, criterion, [])
    with pytest.raises(ValueError, match="batches=0"):
        report(model, criterion, [(x, y)], batches=0)
    with pytest.raises(ValueError, match="every=0"):
        Monitor(model, criterion, every=0)
    with pytest.raises(ValueError, match="no snapshot yet"):
        Monitor(model, criterion).report()
    with pytest.raises(ValueError, match="reduction='none'"):
        snapshot(Objective(model, x, y, nn.CrossEntropyLoss(reduction="none")))
    with pytest.raises(ValueError, match="loss of this minibatch is nan"):
        snapshot(Objective(model, math.nan * x, y, criterion))
    found = snapshot(Objective(model, x, y, criterion))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"torch-adler\[diagnostics\]"):
        Report((found,)).plot()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"torch-adler\[diagnostics\]"):
        report(model, criterion, [(x, y)], progress=True)
