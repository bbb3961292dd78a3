"""Several real processes: all alike, and equal to one process on the joint batch."""

import math

import pytest
import torch
from scenes import (
    CLIPPED,
    DIFFERENCE,
    EVERY_THIRD,
    EXACT,
    GUARDS,
    MUON,
    STEPS,
    Barrier,
    joint_batches,
    network,
    shares,
    train,
    uneven_shares,
)
from support.launch import SCRIPTS, torchrun
from torch import nn

import adler
from adler._optimizers.base import StepRecord

DDP = "DDP, 2 processes, gloo"
FSDP = "FSDP2 (fully_shard), 2 processes, gloo"
CHECKPOINT = "FSDP2, torch.distributed.checkpoint, resumed on 1 and 3 processes"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def found(folder):
    """What both ranks found in every scenario."""
    torchrun(SCRIPTS / "ranks.py", "scenarios", folder, folder / "checkpoint")
    ranks = [torch.load(folder / f"scenarios-2-{r}.pt", weights_only=False) for r in (0, 1)]
    return lambda name: [rank[name] for rank in ranks]


def one_process(
    batches=None,
    kind=adler.Adler,
    batchnorm=False,
    criterion=None,
    tests=False,
    clip=0.0,
    **options,
):
    model, criterion = network(batchnorm), criterion or nn.CrossEntropyLoss()
    optimizer = kind(model.parameters(), model, criterion, **{**EXACT, **options})
    batches = batches or [[b] for b in joint_batches()]
    return train(model, optimizer, batches, criterion, tests=tests, clip=clip)


def assert_alike(ranks):
    """Bit for bit: NaN too, where a step did not measure."""
    first, second = ranks
    same = torch.tensor(first["steps"]), torch.tensor(second["steps"])
    torch.testing.assert_close(*same, rtol=0, atol=0, equal_nan=True)
    assert first["params"].equal(second["params"])
    for a, b in zip(first.get("average", []), second.get("average", [])):
        assert a.equal(b)


def assert_same_run(one, other, rtol=1e-9):
    # A finite difference divides rounding by its step of 1e-6 rates, hence the looser tolerance.
    steps = torch.tensor(one["steps"]), torch.tensor(other["steps"])
    torch.testing.assert_close(*steps, rtol=rtol, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(one["params"], other["params"], rtol=rtol, atol=1e-10)
    torch.testing.assert_close(one.get("tested", []), other["tested"], rtol=rtol, atol=1e-9)


RUNS = {
    "ddp": {},
    "ddp_guarded": GUARDS,
    "ddp_adam": {"kind": adler.AdlerAdam},
    "ddp_schedule_free": {"kind": adler.AdlerScheduleFree, "tests": True},
    "ddp_muon": MUON,
    "ddp_clipped": CLIPPED,
    "ddp_clipped_static_graph": CLIPPED,
    "ddp_clipped_views_of_buckets": CLIPPED,
    "ddp_gauss_newton": {"kind": adler.GaussNewton},
    "ddp_every_third": EVERY_THIRD,
    "ddp_compiled": {},
    "ddp_given_the_inner_module": {},
    "ddp_accumulation": {},
}


@pytest.mark.row(DDP)
@pytest.mark.parametrize("name", RUNS)
def test_ddp_equals_one_process_on_the_joint_batch(found, name):
    ranks = found(name)
    assert_alike(ranks)
    assert_same_run(ranks[0], one_process(**RUNS[name]))


@pytest.mark.row(DDP)
def test_clipping_shortens_no_step_that_does_not_depend_on_the_scale(found):
    """One process and several could be wrong together. Later steps weigh gradients otherwise."""
    rate = StepRecord._fields.index("effective_lr")
    free = one_process(**{**CLIPPED, "clip": 0.0})["steps"][0]
    assert found("ddp_clipped")[0]["steps"][0][rate] == pytest.approx(free[rate], rel=1e-6)


@pytest.mark.row(DDP)
def test_a_part_of_each_share_is_measured(found):
    """By default: as in one process that is given the shares one after the other."""
    ranks = found("ddp_as_by_default")
    assert_alike(ranks)
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = adler.AdlerScheduleFree(model.parameters(), model, criterion)
    assert optimizer.measure.fraction < 1
    batches = [shares(x, y, 2) for x, y in joint_batches()]
    assert_same_run(ranks[0], train(model, optimizer, batches, criterion))


@pytest.mark.row(DDP)
def test_uneven_batches_weigh_as_ranks_do(found):
    """DDP descends the mean of the ranks' losses, not the loss of all examples."""
    ranks = found("ddp_uneven")
    assert_alike(ranks)
    assert_same_run(ranks[0], one_process([uneven_shares(x, y) for x, y in joint_batches()]))
    joint = one_process()
    assert abs(joint["steps"][0][0] / ranks[0]["steps"][0][0] - 1) > 1e-3


SKIPPED = StepRecord._fields.index("skipped")


@pytest.mark.row(DDP)
@pytest.mark.parametrize("name", ["ddp_one_rank_not_finite", "ddp_one_loss_infinite"])
def test_a_bad_batch_on_one_rank_is_skipped_on_all(found, name):
    ranks = found(name)
    assert_alike(ranks)
    assert [step[SKIPPED] for step in ranks[0]["steps"]] == [0, 0, 0, 1, 0, 0, 0, 0]
    batches = [[b] for k, b in enumerate(joint_batches()) if k != 3]
    criterion = Barrier() if name == "ddp_one_loss_infinite" else None
    torch.testing.assert_close(
        ranks[0]["params"], one_process(batches, criterion=criterion)["params"], rtol=1e-9, atol=0
    )


@pytest.mark.row(DDP)
@pytest.mark.parametrize(
    ("name", "match"),
    [("ddp_join", "Give all ranks as many batches"), ("ddp_spectral", "use Adler")],
)
def test_what_cannot_run_on_several_processes_is_refused_on_all(found, name, match):
    for rank in found(name):
        assert match in rank["error"]


FSDP_RUNS = {
    "fsdp": ("ddp_finite_difference", {}),
    "fsdp_guarded": (None, GUARDS),
    "fsdp_adam": ("ddp_finite_difference_adam", {"kind": adler.AdlerAdam, "weight_decay": 0.1}),
    "fsdp_schedule_free": (
        None,
        {"kind": adler.AdlerScheduleFree, "tests": True, "weight_decay": 0.1},
    ),
    "fsdp_muon": (None, MUON),
    "fsdp_clipped": (None, CLIPPED),
    "fsdp_momentum": (None, {"momentum": 0.9}),
    "fsdp_on_a_mesh_of_two_dimensions": ("ddp_finite_difference", {}),
    "fsdp_validated_between": ("ddp_finite_difference", {}),
    "fsdp_falls_back": (None, {}),
}


@pytest.mark.row(FSDP)
@pytest.mark.parametrize("name", FSDP_RUNS)
def test_fsdp_equals_ddp_and_one_process(found, name):
    ranks, (twin, options) = found(name), FSDP_RUNS[name]
    assert_alike(ranks)
    assert_same_run(ranks[0], one_process(**DIFFERENCE, **options), rtol=1e-6)
    if twin is not None:
        assert_same_run(ranks[0], found(twin)[0], rtol=1e-6)


@pytest.mark.row(FSDP)
def test_fsdp_shards_stay_shards_and_the_fallback_warns_once(found):
    assert all(rank["sharded"] for rank in found("fsdp"))
    for rank in found("fsdp_falls_back"):
        assert len(rank["said"]) == 1
        assert "sharded parameters" in rank["said"][0]


@pytest.mark.row(FSDP)
def test_fsdp_uneven_batches_weigh_as_ranks_do(found):
    ranks = found("fsdp_uneven")
    assert_alike(ranks)
    batches = [uneven_shares(x, y) for x, y in joint_batches()]
    assert_same_run(ranks[0], one_process(batches, **DIFFERENCE), rtol=1e-6)


@pytest.mark.row(FSDP)
def test_running_statistics_move_once_a_step(found):
    """Each rank has its own, of its own share."""
    for name in ("fsdp_batchnorm", "ddp_batchnorm"):
        for rank, found_there in enumerate(found(name)):
            mean, _, count = found_there["buffers"]
            assert int(count) == STEPS
            assert not mean.equal(found(name)[1 - rank]["buffers"][0])
    sharded, replicated = found("fsdp_batchnorm")[0], found("ddp_batchnorm")[0]
    assert_same_run(sharded, replicated, rtol=1e-6)
    torch.testing.assert_close(sharded["buffers"], replicated["buffers"], rtol=1e-6, atol=1e-9)


OF_THE_AVERAGE = [
    pytest.param("ddp_statistics_of_the_average", marks=pytest.mark.row(DDP)),
    pytest.param("ddp_statistics_of_rank_0", marks=pytest.mark.row(DDP)),
    pytest.param("fsdp_statistics_of_the_average", marks=pytest.mark.row(FSDP)),
]


@pytest.mark.parametrize("name", OF_THE_AVERAGE)
def test_running_statistics_are_those_of_the_average_on_this_ranks_batches(found, name):
    for number, rank in enumerate(found(name)):
        torch.testing.assert_close(rank["found"], rank["right"], rtol=1e-9, atol=1e-12)
        if number == 0 or name != "ddp_statistics_of_rank_0":
            assert all(a.equal(b) for a, b in zip(rank["saved"], rank["tested"], strict=True))
        assert rank["untouched"]
        assert rank["after"].equal(rank["without"])
    if name == "ddp_statistics_of_rank_0":
        first, second = found(name)
        assert all(a.equal(b) for a, b in zip(first["tested"], second["tested"], strict=True))


@pytest.mark.row(DDP)
def test_one_rank_may_save_alone(found):
    ranks = found("ddp_saved_by_one_rank")
    assert_alike(ranks)
    twin = found("ddp_statistics_of_rank_0")[0]
    assert all(a.equal(b) for a, b in zip(ranks[0]["saved"].values(), twin["saved"], strict=True))
    assert ranks[0]["params"].equal(twin["without"])


@pytest.mark.row(DDP)
def test_synchronised_statistics_are_found_by_one_rank_alone(found):
    ranks = found("synchronised_statistics_of_one_rank")
    torch.testing.assert_close(ranks[0]["found"], ranks[0]["right"], rtol=1e-9, atol=1e-12)
    assert all(rank["synchronises"] for rank in ranks)


@pytest.mark.row(FSDP)
def test_ranks_that_have_kept_unequal_numbers_of_batches_do_not_wait_for_each_other(found):
    first, second = found("fsdp_uneven_statistics_of_the_average")
    assert first["kept"] != second["kept"]
    weights = [a.equal(b) for a, b in zip(first["saved"], second["saved"], strict=True)]
    assert weights.count(False) == 2  # mean and variance of each rank's own share


@pytest.mark.row(FSDP)
def test_a_replay_that_fails_leaves_every_bit(found):
    for rank in found("fsdp_replay_that_fails"):
        assert "in the middle of the replay" in rank["said"]
        assert rank["same"]


@pytest.mark.row(FSDP)
def test_fsdp_a_bad_batch_on_one_rank_is_skipped_on_all(found):
    ranks = found("fsdp_one_loss_infinite")
    assert_alike(ranks)
    assert [step[SKIPPED] for step in ranks[0]["steps"]] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert all(math.isfinite(p) for p in ranks[0]["params"].tolist())


@pytest.mark.row(FSDP)
def test_several_meshes_are_refused(found):
    for rank in found("fsdp_several_meshes"):
        assert "give fully_shard the same mesh=" in rank["error"]


@pytest.mark.row(CHECKPOINT)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_resumes_on_another_number_of_processes(found, folder, ranks):
    found("save_sgd")  # has run
    torchrun(SCRIPTS / "ranks.py", "resume", folder, folder / "checkpoint", ranks=ranks)
    for kind in ("sgd", "adam"):
        expected = found(f"save_{kind}")[0]
        for rank in range(ranks):
            there = torch.load(folder / f"resume-{ranks}-{rank}.pt", weights_only=False)
            resumed = there[f"resume_{kind}"]
            # clipped_total and skipped_total count since the optimizer was made
            ours, theirs = ([s[:6] for s in run["steps"]] for run in (resumed, expected))
            # Adam's first steps are long and its rates small: the difference rounds to 1e-5.
            torch.testing.assert_close(
                torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-12
            )
            torch.testing.assert_close(resumed["params"], expected["params"], rtol=1e-6, atol=1e-8)


def test_shares_make_the_joint_batch():
    x, y = joint_batches()[0]
    for ranks in (1, 2, 3):
        assert torch.cat([a for a, _ in shares(x, y, ranks)]).equal(x)
