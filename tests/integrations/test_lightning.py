"""PyTorch Lightning: the Trainer's loop steps as the plain one."""

from __future__ import annotations

import copy
import csv
import gc
import pickle
from pathlib import Path

import pytest
import torch
from support.cases import flat
from support.loops import numbers
from torch import nn
from torch.nn import functional as F

from adler import Adler, AdlerAdam, AdlerScheduleFree, GaussNewton

L = pytest.importorskip("lightning.pytorch")

pytestmark = [
    # Said of any small loader.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
    # Lightning's own use of PyTorch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning:lightning.*"),
]


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3)
    ).to(dtype)


def loader(dtype=torch.float64, n=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, dtype=dtype, generator=generator)
    y = torch.randint(3, (n,), generator=generator)
    data = torch.utils.data.TensorDataset(x, y)
    # A generator of its own: loaders draw a number at every epoch.
    return torch.utils.data.DataLoader(data, batch_size=8, generator=generator)


class Classifier(L.LightningModule):
    """The optimizer is given the submodule, or the whole module."""

    def __init__(self, make=Adler, whole=False, dtype=torch.float64):
        super().__init__()
        self.net, self.criterion = network(dtype), nn.CrossEntropyLoss()
        self.make, self.whole = make, whole

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self(x), y)

    def configure_optimizers(self):
        model = self if self.whole else self.net
        optimizer = self.make(self.parameters(), model, self.criterion)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Manual(Classifier):
    """Two micro-batches a step, by hand."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        for x, y in zip(batch[0].chunk(2), batch[1].chunk(2)):
            self.manual_backward(self.criterion(self(x), y) / 2)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()
        schedule.step()


def trainer(**options):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )


def fit(module, data=None, validation=None, **options):
    made = trainer(**options)
    torch.manual_seed(2)
    made.fit(module, loader() if data is None else data, validation)
    return made


def plain(
    make, accumulated=1, clip=None, chunks=1, autocast=False, dtype=torch.float64, whole=False
):
    net, criterion = network(dtype), nn.CrossEntropyLoss()
    optimizer = make(net.parameters(), net, criterion)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    torch.manual_seed(2)
    for _ in range(2):
        batches = list(loader(dtype))
        for number, (x, y) in enumerate(batches, 1):
            for x_part, y_part in zip(x.chunk(chunks), y.chunk(chunks)):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = criterion(net(x_part), y_part) / (accumulated * chunks)
                loss.backward()
            if number % accumulated and number < len(batches):
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return net, optimizer


def agree(module, run, net, optimizer, rtol=1e-12):
    torch.testing.assert_close(flat(module.net), flat(net), rtol=rtol, atol=1e-12)
    assert all(a.equal(b) for a, b in zip(module.net.buffers(), net.buffers()))
    assert numbers(run.optimizers[0]) == pytest.approx(numbers(optimizer), rel=1e-9)


# --- automatic optimisation -----------------------------------------------------------------------


@pytest.mark.row("Lightning, automatic optimisation", versions=["lightning"])
@pytest.mark.parametrize("whole", [True, False], ids=["module", "submodule"])
@pytest.mark.parametrize("make", [Adler, AdlerAdam, GaussNewton])
def test_the_trainer_steps_as_the_plain_loop(make, whole):
    module = Classifier(make, whole)
    agree(module, fit(module), *plain(make))


@pytest.mark.row("Lightning, accumulation and clipping", versions=["lightning"])
@pytest.mark.parametrize("make", [Adler, AdlerAdam])
@pytest.mark.parametrize(("accumulated", "clip"), [(2, None), (1, 0.5), (2, 0.5)])
def test_accumulation_and_clipping(make, accumulated, clip):
    module = Classifier(make)
    run = fit(module, accumulate_grad_batches=accumulated, gradient_clip_val=clip)
    agree(module, run, *plain(make, accumulated, clip))


@pytest.mark.row("Lightning, precision flags", versions=["lightning"])
@pytest.mark.parametrize(("accumulated", "clip"), [(1, None), (2, 0.5)])
def test_bf16_mixed(accumulated, clip):
    module = Classifier(Adler, dtype=torch.float32)
    run = fit(
        module,
        loader(torch.float32),
        precision="bf16-mixed",
        accumulate_grad_batches=accumulated,
        gradient_clip_val=clip,
    )
    net, optimizer = plain(Adler, accumulated, clip, autocast=True, dtype=torch.float32)
    torch.testing.assert_close(flat(module.net), flat(net))
    assert numbers(run.optimizers[0]) == pytest.approx(numbers(optimizer), rel=1e-4)
    assert int(optimizer.last_step.skipped_total) == 0


@pytest.mark.row("Lightning, precision flags", versions=["lightning"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_gradient_scaler(clip):
    """In bfloat16, which the CPU computes; the scale is a power of two and drops out."""
    precision = L.plugins.precision.MixedPrecision(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0)
    )
    precision.precision = "bf16-mixed"
    module = Classifier(Adler, dtype=torch.float32)
    run = fit(module, loader(torch.float32), plugins=[precision], gradient_clip_val=clip)
    net, optimizer = plain(Adler, clip=clip, autocast=True, dtype=torch.float32)
    torch.testing.assert_close(flat(module.net), flat(net), rtol=1e-3, atol=1e-5)
    assert numbers(run.optimizers[0]) == pytest.approx(numbers(optimizer), rel=1e-2)


@pytest.mark.row("Lightning, precision flags", versions=["lightning"])
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "32-true"])
def test_true_precisions_train(precision):
    module = Classifier(AdlerAdam, dtype=torch.float32)
    data = loader(torch.float32)
    x, y = data.dataset.tensors
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    before = float(F.cross_entropy(module.net(x), y).detach())
    run = fit(module, data, precision=precision, max_epochs=8)
    assert next(module.parameters()).dtype == dtype
    assert int(run.optimizers[0].last_step.skipped_total) == 0
    assert float(F.cross_entropy(module.net(x.to(dtype)), y).detach()) < before


@pytest.mark.row("Lightning, automatic optimisation", versions=["lightning"])
def test_validation_between_the_steps_changes_nothing():
    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("val_loss", self.criterion(self(x), y))

    module = Validated(Adler, whole=True)
    run = fit(module, validation=loader(n=16), val_check_interval=2)
    agree(module, run, *plain(Adler))
    assert float(run.callback_metrics["val_loss"]) > 0


@pytest.mark.row("Lightning, automatic optimisation", versions=["lightning"])
def test_a_functional_loss_is_an_error_that_says_what_to_do():
    class Functional(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x), y)

    with pytest.raises(RuntimeError, match="criterion given to the optimizer was not called"):
        fit(Functional())


# --- manual optimisation --------------------------------------------------------------------------


@pytest.mark.row("Lightning, manual optimisation", versions=["lightning"])
@pytest.mark.parametrize("whole", [True, False], ids=["module", "submodule"])
@pytest.mark.parametrize("make", [Adler, AdlerAdam])
def test_manual_optimisation_steps_as_the_plain_loop(make, whole):
    module = Manual(make=make, whole=whole)
    agree(module, fit(module), *plain(make, clip=0.5, chunks=2))


@pytest.mark.row("Lightning, manual optimisation", versions=["lightning"])
def test_a_functional_loss_with_explicit_targets():
    class Functional(Manual):
        def training_step(self, batch, batch_idx):
            x, y = batch
            optimizer, schedule = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(x), y))
            optimizer.step(targets=y)
            schedule.step()

    module = Functional()
    agree(module, fit(module), *plain(Adler))


# --- monitors, checkpoints, copies ----------------------------------------------------------------


@pytest.mark.row("Lightning, LearningRateMonitor", versions=["lightning"])
def test_the_monitor_logs_the_multiplier_and_one_line_logs_the_rest(tmp_path):
    class Logged(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log_dict(self.optimizers().scalars("adler/"))

    logger = L.loggers.CSVLogger(tmp_path)
    module = Logged(Adler)
    monitor = L.callbacks.LearningRateMonitor(logging_interval="step")
    run = fit(module, logger=logger, callbacks=[monitor], log_every_n_steps=1)
    logger.save()
    logged = csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines())
    metrics = [{key: float(value) for key, value in row.items() if value} for row in logged]
    lrs = [row["lr-Adler"] for row in metrics if "lr-Adler" in row]
    assert lrs == pytest.approx([0.9**k for k in range(10)])
    rows = [row for row in metrics if "adler/slope" in row]
    assert len(rows) == 10
    last = run.optimizers[0].scalars("adler/")
    assert {key: rows[-1][key] for key in last} == pytest.approx(last, rel=1e-6, nan_ok=True)
    rate = rows[-1]["adler/effective_lr"]
    assert rows[-1]["adler/applied_lr"] == pytest.approx(0.9**9 * rate, rel=1e-6)


@pytest.mark.row("Lightning, checkpoints", versions=["lightning"])
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("make", [Adler, AdlerAdam])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(make, tmp_path):
    class Seeded(Classifier):
        """Lightning leaves the random state to the user."""

        def on_train_epoch_start(self):
            torch.manual_seed(self.current_epoch)

    def saver(folder):
        return L.callbacks.ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)

    whole = Seeded(make)
    run = fit(whole, max_epochs=4, callbacks=[saver("a")], enable_checkpointing=True)
    resumed = Seeded(make)
    again = trainer(max_epochs=4, callbacks=[saver("b")], enable_checkpointing=True)
    again.fit(resumed, loader(), ckpt_path=str(tmp_path / "a/epoch=1.ckpt"))
    assert flat(resumed.net).equal(flat(whole.net))
    states = [made.optimizers[0].state_dict() for made in (run, again)]
    assert str(states[0]) == str(states[1])


@pytest.mark.row("Lightning, checkpoints", versions=["lightning"])
def test_copies_and_pickles_after_training_go_on_alike():
    module = Classifier(AdlerAdam)
    run = fit(module)
    pair = module.net, run.optimizers[0]
    twins = [copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))]
    assert copy.deepcopy(module).net is not module.net
    x, y = next(iter(loader()))
    ends = []
    for net, optimizer in [pair, *twins]:
        torch.manual_seed(3)
        optimizer.zero_grad()
        optimizer.criterion(net(x), y).backward()
        optimizer.step()
        ends.append(flat(net))
    assert all(end.equal(ends[0]) for end in ends)


@pytest.mark.row("Lightning, checkpoints", versions=["lightning"])
def test_training_leaves_no_hook_behind():
    module = Classifier(Adler, whole=True)
    for _ in range(3):
        fit(module, max_epochs=1)
    gc.collect()
    # Those of the last optimizer, which its Trainer holds: what records, what places the weights,
    # what keeps batches for running statistics.
    assert len(module._forward_pre_hooks) <= 3
    assert len(module.criterion._forward_hooks) <= 1


# --- the average, tested and saved ----------------------------------------------------------------


@pytest.mark.row("Lightning, checkpoints", versions=["lightning"])
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("whole", [True, False], ids=["module", "submodule"])
def test_a_checkpoint_without_validation_holds_the_average(whole, tmp_path):
    """And a run that goes on from it ends, bit for bit, where the uninterrupted one does."""

    class Seeded(Classifier):
        def on_train_epoch_start(self):
            torch.manual_seed(self.current_epoch)

    def saver(folder):
        return L.callbacks.ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)

    # Of an epoch there are as many batches as running statistics are found on.
    module, size = Seeded(AdlerScheduleFree, whole), 16 * 8
    options = {"max_epochs": 4, "enable_checkpointing": True}
    run = fit(module, loader(n=size), callbacks=[saver("a")], **options)
    saved = torch.load(tmp_path / "a/epoch=3.ckpt", weights_only=False)["state_dict"]
    run.optimizers[0].eval()
    assert saved.keys() == module.state_dict().keys()
    assert all(saved[key].equal(value) for key, value in module.state_dict().items())
    run.optimizers[0].train()
    assert not all(saved[key].equal(value) for key, value in module.named_parameters())

    resumed = Seeded(AdlerScheduleFree, whole)
    again = trainer(callbacks=[saver("b")], **options)
    again.fit(resumed, loader(n=size), ckpt_path=str(tmp_path / "a/epoch=1.ckpt"))
    for mine, theirs in [
        (resumed.named_parameters(), module.named_parameters()),
        (resumed.named_buffers(), module.named_buffers()),
    ]:
        assert all(a.equal(b) for (_, a), (_, b) in zip(mine, theirs, strict=True))
    ends = [torch.load(tmp_path / f"{f}/epoch=3.ckpt", weights_only=False) for f in "ab"]
    assert str(ends[0]["state_dict"]) == str(ends[1]["state_dict"])


@pytest.mark.row("Lightning, automatic optimisation", versions=["lightning"])
def test_validation_sees_the_average_with_its_running_statistics():
    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("val_loss", self.criterion(self(x), y))

    module = Validated(AdlerScheduleFree, whole=True)
    data = loader(n=80)
    run = fit(module, data, validation=data)
    found = float(run.callback_metrics["val_loss"])
    run.optimizers[0].eval()
    torch.optim.swa_utils.update_bn(data, module)
    module.eval()
    x, y = data.dataset.tensors
    with torch.no_grad():
        assert found == pytest.approx(float(module.criterion(module(x), y)), rel=0.02)
