"""Which parameters Muon moves, and what is said of them; its steps are in `test_trajectories`."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from support.cases import batches, flat, network
from support.loops import train
from torch import nn
from torch.nn.utils import weight_norm

from adler import AdlerMuon, Measure, hidden_matrices
from adler._optimizers.gradients import gradients_in

DEEP = (5, 8, 8, 8, 3)


def deep():
    torch.manual_seed(0)
    layers = [nn.Linear(n, m) for n, m in pairwise(DEEP)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).double()


class Language(nn.Module):
    """A small language model with learned positions; the head may be the embedding's."""

    def __init__(self, tied):
        super().__init__()
        self.tokens, self.position = nn.Embedding(7, 8), nn.Parameter(torch.randn(4, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 7, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(self.block(self.tokens(x) + self.position)).flatten(0, 1)


BLOCK = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"]
BLOCK = [f"block.{name}" for name in [*BLOCK, "linear2.weight"]]

HIDDEN = {
    "layers": (deep, ["2.weight", "4.weight"]),
    "one": (lambda: nn.Linear(3, 2), []),
    "none": (nn.Tanh, []),
    "embedding and head": (lambda: Language(tied=False), BLOCK),
    "tied": (lambda: Language(tied=True), BLOCK),
    "gains": (
        lambda: nn.Sequential(nn.Linear(3, 4), weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)),
        ["1.weight_v"],
    ),
    "recurrent": (
        lambda: nn.ModuleList([nn.Embedding(7, 4), nn.GRU(4, 5), nn.Linear(5, 7)]),
        ["1.weight_ih_l0", "1.weight_hh_l0"],
    ),
    "pictures": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 6, 3),
            nn.LayerNorm([6, 4, 4]),
            nn.Flatten(),
            nn.Linear(96, 5),
            nn.Linear(5, 2),
        ),
        ["2.weight", "5.weight"],
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(("make", "names"), HIDDEN.values(), ids=HIDDEN)
def test_hidden_matrices_are_those_of_all_layers_but_the_first_and_the_last(make, names):
    assert hidden_matrices(make()) == names


@pytest.mark.parametrize("tied", [False, True])
def test_no_parameter_is_dropped(tied):
    model, criterion = Language(tied), nn.CrossEntropyLoss()
    optimizer = AdlerMuon(model.parameters(), model, criterion)
    blocks = optimizer.blocks()
    assert blocks["orthogonal"] == BLOCK
    assert sorted(blocks["orthogonal"] + blocks["adam"]) == sorted(dict(model.named_parameters()))
    x = torch.randint(7, (3, 4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    criterion(model(x), torch.randint(7, (12,))).backward()
    optimizer.step()
    assert all(not p.equal(before[name]) for name, p in model.named_parameters())


def test_names_and_patterns_choose():
    model, criterion = deep(), nn.CrossEntropyLoss()
    optimizer = AdlerMuon(model.parameters(), model, criterion, matrices=["0.*", "6.weight"])
    assert optimizer.blocks() == {
        "orthogonal": ["0.weight", "6.weight"],
        "adam": ["0.bias", "2.weight", "2.bias", "4.weight", "4.bias", "6.bias"],
    }


@pytest.mark.parametrize(
    ("matrices", "kind", "said"),
    [
        (["9.weight"], ValueError, "no parameter is called '9.weight'; there are 0.weight, 0.bias"),
        (["0.bias"], ValueError, "only vectors are called '0.bias'"),
        ("0.weight", TypeError, "expected a list of names or patterns, got a string"),
        ([0], TypeError, "expected names or patterns, got int"),
    ],
)
def test_what_cannot_be_is_refused(matrices, kind, said):
    model = deep()
    with pytest.raises(kind, match=said):
        AdlerMuon(model.parameters(), model, nn.CrossEntropyLoss(), matrices=matrices)


def test_groups_stay_the_users():
    model, criterion = deep(), nn.CrossEntropyLoss()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1, "momentum": 0.5}, {"params": others}]
    optimizer = AdlerMuon(groups, model, criterion)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.blocks()["orthogonal"] == ["2.weight", "4.weight"]
    train(model, criterion, optimizer, [(torch.randn(6, 5).double(), torch.randint(3, (6,)))])


def test_a_checkpoint_says_which_are_orthogonalised():
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    data = batches("mlp-tanh", criterion, 8)
    optimizer = AdlerMuon(model.parameters(), model, criterion, matrices=["0.weight"])
    train(model, criterion, optimizer, data[:4])
    twin = copy.deepcopy(model)
    other = AdlerMuon(twin.parameters(), twin, criterion)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.blocks() == optimizer.blocks()
    train(model, criterion, optimizer, data[4:])
    train(twin, criterion, other, data[4:])
    assert flat(twin).equal(flat(model))


def test_a_model_that_grows_is_looked_at_anew():
    model = deep()
    optimizer = AdlerMuon(model[:7].parameters(), model, nn.CrossEntropyLoss())
    assert optimizer.blocks()["orthogonal"] == ["2.weight", "4.weight"]
    model.append(nn.Linear(3, 4).double())
    optimizer.add_param_group({"params": model[8].parameters()})
    assert optimizer.blocks()["orthogonal"] == ["2.weight", "4.weight", "6.weight"]


def test_the_measured_length_is_that_of_both_blocks_together():
    """The minimiser along the direction, by a finite difference of the loss itself."""
    criterion = nn.MSELoss()
    x, y = torch.randn(8, 5).double(), torch.randn(8, 3).double()
    linear = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    for p in list(linear.parameters())[:2] + list(linear.parameters())[4:]:
        p.requires_grad_(False)  # linear in what is left, so that the model of the loss is exact
    optimizer = AdlerMuon(
        linear[1].parameters(),
        linear,
        criterion,
        guard=None,
        eps=0.0,
        interpolation=None,
        measure=Measure.every_step(),
        momentum=0.0,
    )
    before = flat(linear)
    criterion(linear(x), y).backward()
    optimizer.step()
    step, losses = before - flat(linear), []
    for factor in (0.9, 1.0, 1.1):
        nn.utils.vector_to_parameters(before - factor * step, linear.parameters())
        losses.append(float(criterion(linear(x), y).detach()))
    assert losses[1] < min(losses[0], losses[2])
    # A parabola has its vertex half way between points of equal height.
    assert losses[0] == pytest.approx(losses[2], rel=1e-9)


def test_what_a_skipped_measurement_has_seen_is_not_kept():
    """Between measurements the slope is made of what the last one has seen."""
    model, criterion = deep(), nn.CrossEntropyLoss()
    measure = Measure(warmup=0, every=2)
    optimizer = AdlerMuon(model.parameters(), model, criterion, measure=measure)
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    train(model, criterion, optimizer, [(x, y)] * 2)
    held = copy.deepcopy(optimizer.state_dict()["state"])
    train(model, criterion, optimizer, [(math.nan * x, y)])
    assert bool(optimizer.last_step.skipped)
    for number, state in optimizer.state_dict()["state"].items():
        assert all(value.equal(held[number][name]) for name, value in state.items())


@pytest.mark.parametrize("unknown", ["unfrozen at a skipped step", "without a gradient"])
def test_a_matrix_of_which_nothing_was_measured_counts_between_measurements(unknown):
    model, criterion = deep(), nn.CrossEntropyLoss()
    measure = Measure(warmup=0, every=8)
    optimizer = AdlerMuon(model.parameters(), model, criterion, measure=measure)
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    late = dict(model.named_parameters())["2.weight"]
    if unknown == "without a gradient":
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        late.grad.zero_()
        optimizer.step()
    else:
        late.requires_grad_(False)
        train(model, criterion, optimizer, [(x, y)] * 2)
        late.requires_grad_(True)
        train(model, criterion, optimizer, [(math.nan * x, y)])
        assert bool(optimizer.last_step.skipped)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    params, gradients = gradients_in(optimizer.param_groups)
    home = torch.device("cpu")
    (remembered, true) = (
        optimizer._inner_direction(params, gradients, {id(optimizer.param_groups[0]): False}).look(
            gradients, home, measured=measured
        )
        for measured in (False, True)
    )
    (slope, squared_norm, sizes), (true_slope, true_norm, true_sizes) = remembered, true
    at = [p is late for p in params].index(True)
    # Newton and Schulz leave singular values between 0.7 and 1.2; the angle is the others'.
    assert 0.6 < float(sizes[at] / true_sizes[at]) < 1.6
    assert float(squared_norm / true_norm) == pytest.approx(1, abs=0.5)
    assert float(slope / true_slope) == pytest.approx(1, abs=0.5)
