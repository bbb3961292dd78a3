"""Where PyTorch's forward rules compute otherwise than the training pass did."""

import copy

import pytest
import torch
from loops import train
from torch import nn
from torch.nn import functional as F

from adler import Adler, curvature
from adler.engines import ForwardModeUnsupportedError, forward

# --- dropout: the mask is that of the training pass, whatever the layout of its input -------------


class Dropped(nn.Module):
    """Two layers, and dropout of what is between them in some layout."""

    def __init__(self, drop):
        super().__init__()
        self.before, self.after, self.drop = nn.Linear(4, 8), nn.Linear(8, 3), drop

    def forward(self, x):
        return self.after(self.drop(self.before(x))[:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x)[:, -1])


def turned(f):
    return lambda x: f(x.transpose(1, 2)).transpose(1, 2)


def pictures(f):
    """As channels-last pictures, one pixel wide."""
    return lambda x: (
        f(x.transpose(1, 2).unsqueeze(3).contiguous(memory_format=torch.channels_last))
        .squeeze(3)
        .transpose(1, 2)
    )


LAYOUTS = {
    "plain": nn.Dropout(0.5),
    "turned": turned(nn.Dropout(0.5)),
    "turned, in place": turned(nn.Dropout(0.5, inplace=True)),
    "heads": lambda x: (
        F.dropout(x.unflatten(2, (2, 4)).transpose(1, 2), 0.3).transpose(1, 2).flatten(2)
    ),
    "channels-last": pictures(nn.Dropout(0.5)),
    "channels": pictures(nn.Dropout2d(0.5)),
    "alpha": turned(nn.AlphaDropout(0.3)),
    "none": turned(nn.Dropout(0.0)),
    "all": lambda x: x + turned(nn.Dropout(1.0))(x),
    "evaluated": turned(nn.Dropout(0.5).eval()),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "encoder"])
def test_the_mask_is_that_of_the_training_pass(layout):
    torch.manual_seed(0)
    model = (Encoder() if layout == "encoder" else Dropped(LAYOUTS[layout])).double()
    criterion = nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion)
    for _ in range(3):
        x, y = torch.randn(6, 5, 4).double(), torch.randint(3, (6,))
        train(model, criterion, optimizer, [(x, y)])
        assert optimizer.param_groups[0]["jvp"] == "forward"
        assert float(optimizer.last_step.consistency) == pytest.approx(1, rel=1e-9)


# --- norms under autocast -------------------------------------------------------------------------

NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, evaluated": lambda: nn.BatchNorm2d(4).eval(),
    "batch, without parameters": lambda: nn.BatchNorm2d(4, affine=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer": lambda: nn.LayerNorm([6, 6]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_a_convolution_may_follow_a_norm_under_autocast(norm, dtype):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), NORMS[norm](), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()]
    model, criterion = nn.Sequential(*layers, nn.Linear(64, 3)), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion)
    for _ in range(3):
        x, y = torch.randn(32, 3, 8, 8), torch.randint(3, (32,))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = criterion(model(x), y)
        loss.backward()
        twin = copy.deepcopy(model).double()
        along = [p.grad.double() for p in model.parameters()]
        exact = curvature.quadratic_form(twin, twin.parameters(), x.double(), y, criterion, along)
        optimizer.step()
        assert optimizer.param_groups[0]["jvp"] == "forward"
        # Three digits of a bfloat16, through six layers.
        assert float(optimizer.last_step.curvature) == pytest.approx(float(exact), rel=0.03)


def test_networks_in_half_precision_throughout_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).bfloat16()
    x, criterion = torch.randn(16, 4).bfloat16(), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion)
    train(model, criterion, optimizer, [(x, torch.randint(3, (16,)))] * 2)
    assert float(optimizer.last_step.consistency) == pytest.approx(1, rel=0.05)


def test_other_pairs_of_precisions_are_no_error_of_the_loop():
    def f(params):
        x = torch.ones(1, 1, 3, 3, dtype=torch.bfloat16)
        return F.conv2d(x, params["w"]).sum()

    w = {"w": torch.ones(1, 1, 2, 2)}
    with pytest.raises(ForwardModeUnsupportedError, match="another precision"):
        forward(f, w, w)
