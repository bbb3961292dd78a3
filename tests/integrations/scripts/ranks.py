"""What each of several processes finds; started by ``torchrun``, saves one file a rank.

torchrun --standalone --nproc-per-node 2 ranks.py scenarios OUT
torchrun --standalone --nproc-per-node 3 ranks.py resume OUT CHECKPOINT
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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
    outputs_in_a_test,
    shares,
    train,
    uneven_shares,
    whole,
)
from torch import nn
from torch.distributed.algorithms import Join
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

import adler
from adler._optimizers import running_statistics
from adler._optimizers.running_statistics import RunningStatistics
from adler._recording.replay import is_replaying

Scenario = Callable[[], dict[str, Any]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def mine(batches: list[Any] | None = None) -> list[list[Any]]:
    """This rank's share of every joint batch."""
    batches = joint_batches() if batches is None else batches
    return [[shares(x, y, dist.get_world_size())[dist.get_rank()]] for x, y in batches]


def sharded(model: nn.Module, mesh: Any = None) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def run(
    model: nn.Module,
    batches: Any = None,
    kind: Any = adler.Adler,
    tests: bool = False,
    clip: float = 0.0,
    **options: Any,
) -> Any:
    criterion = nn.CrossEntropyLoss()
    optimizer = kind(model.parameters(), model, criterion, **{**EXACT, **options})
    return train(model, optimizer, batches or mine(), criterion, tests=tests, clip=clip)


@scenario
def ddp() -> dict[str, Any]:
    return run(DistributedDataParallel(network()))


@scenario
def ddp_guarded() -> dict[str, Any]:
    return run(DistributedDataParallel(network()), **GUARDS)


@scenario
def ddp_adam() -> dict[str, Any]:
    return run(DistributedDataParallel(network()), kind=adler.AdlerAdam)


@scenario
def ddp_schedule_free() -> dict[str, Any]:
    return run(DistributedDataParallel(network()), kind=adler.AdlerScheduleFree, tests=True)


@scenario
def ddp_muon() -> dict[str, Any]:
    return run(DistributedDataParallel(network()), **MUON)


@scenario
def ddp_clipped() -> dict[str, Any]:
    """The gradients that are clipped are those that the ranks have exchanged."""
    return run(DistributedDataParallel(network()), **CLIPPED)


@scenario
def ddp_clipped_static_graph() -> dict[str, Any]:
    """Whose first backward pass exchanges all gradients later than the others do."""
    return run(DistributedDataParallel(network(), static_graph=True), **CLIPPED)


@scenario
def ddp_clipped_views_of_buckets() -> dict[str, Any]:
    return run(DistributedDataParallel(network(), gradient_as_bucket_view=True), **CLIPPED)


@scenario
def ddp_gauss_newton() -> dict[str, Any]:
    return run(DistributedDataParallel(network()), kind=adler.GaussNewton)


@scenario
def ddp_finite_difference() -> dict[str, Any]:
    return run(DistributedDataParallel(network()), **DIFFERENCE)


@scenario
def ddp_every_third() -> dict[str, Any]:
    return run(DistributedDataParallel(network()), **EVERY_THIRD)


@scenario
def ddp_as_by_default() -> dict[str, Any]:
    """On the first examples of each share."""
    model, criterion = DistributedDataParallel(network()), nn.CrossEntropyLoss()
    optimizer = adler.AdlerScheduleFree(model.parameters(), model, criterion)
    return train(model, optimizer, mine(), criterion)


@scenario
def ddp_compiled() -> dict[str, Any]:
    return run(DistributedDataParallel(torch.compile(network(), backend="eager")))


@scenario
def ddp_given_the_inner_module() -> dict[str, Any]:
    """As frameworks do, which make the optimizer before they wrap the model."""
    inner, criterion = network(), nn.CrossEntropyLoss()
    optimizer = adler.Adler(inner.parameters(), inner, criterion, **EXACT)
    return train(DistributedDataParallel(inner), optimizer, mine(), criterion)


@scenario
def ddp_uneven() -> dict[str, Any]:
    return run(
        DistributedDataParallel(network()),
        [[uneven_shares(x, y)[dist.get_rank()]] for x, y in joint_batches()],
    )


@scenario
def ddp_accumulation() -> dict[str, Any]:
    """Two micro-batches, the first under ``no_sync``."""
    model, criterion = DistributedDataParallel(network()), nn.CrossEntropyLoss()
    optimizer = adler.Adler(model.parameters(), model, criterion, **EXACT)
    steps = []
    for ((x, y),) in mine():
        optimizer.zero_grad()
        with model.no_sync():
            (criterion(model(x[:3]), y[:3]) / 2).backward()
        (criterion(model(x[3:]), y[3:]) / 2).backward()
        optimizer.step()
        told = optimizer.last_step._replace(consistency=torch.zeros(()))  # unknown between ranks
        steps.append([float(number) for number in told])
    return {"steps": steps, "params": torch.cat([p.detach().flatten() for p in model.parameters()])}


@scenario
def ddp_one_rank_not_finite() -> dict[str, Any]:
    batches = mine()
    if dist.get_rank() == 1:
        batches[3][0][0][0, 0] = torch.nan
    return run(DistributedDataParallel(network()), batches)


@scenario
def ddp_one_loss_infinite() -> dict[str, Any]:
    """Its gradient is finite: only the loss tells, on one rank alone."""
    batches = mine()
    if dist.get_rank() == 1:
        batches[3][0][1][0] = -1
    model, criterion = DistributedDataParallel(network()), Barrier()
    optimizer = adler.Adler(model.parameters(), model, criterion, **EXACT)
    return train(model, optimizer, batches, criterion)


def refused(act: Callable[[], Any]) -> dict[str, Any]:
    try:
        act()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


@scenario
def ddp_join() -> dict[str, Any]:
    model = DistributedDataParallel(network())

    def act() -> None:
        with Join([model]):
            run(model)

    found = refused(act)
    dist.barrier()
    return found


@scenario
def ddp_spectral() -> dict[str, Any]:
    return refused(lambda: run(DistributedDataParallel(network()), kind=adler.SpectralSGD))


@scenario
def fsdp() -> dict[str, Any]:
    model = sharded(network())
    found = run(model, **DIFFERENCE)
    return found | {"sharded": all(hasattr(p, "device_mesh") for p in model.parameters())}


@scenario
def fsdp_guarded() -> dict[str, Any]:
    return run(sharded(network()), **DIFFERENCE, **GUARDS)


@scenario
def fsdp_adam() -> dict[str, Any]:
    return run(sharded(network()), kind=adler.AdlerAdam, weight_decay=0.1, **DIFFERENCE)


@scenario
def fsdp_schedule_free() -> dict[str, Any]:
    """A test leaves the root's parameters gathered, all of them here, when the weights change."""
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return run(model, kind=adler.AdlerScheduleFree, tests=True, weight_decay=0.1, **DIFFERENCE)


@scenario
def fsdp_muon() -> dict[str, Any]:
    """Matrices are gathered, orthogonalised and scattered again."""
    return run(sharded(network()), **MUON, **DIFFERENCE)


@scenario
def fsdp_clipped() -> dict[str, Any]:
    return run(sharded(network()), **CLIPPED, **DIFFERENCE)


@scenario
def fsdp_momentum() -> dict[str, Any]:
    return run(sharded(network()), momentum=0.9, **DIFFERENCE)


@scenario
def ddp_finite_difference_adam() -> dict[str, Any]:
    return run(
        DistributedDataParallel(network()), kind=adler.AdlerAdam, weight_decay=0.1, **DIFFERENCE
    )


@scenario
def fsdp_uneven() -> dict[str, Any]:
    batches = [[uneven_shares(x, y)[dist.get_rank()]] for x, y in joint_batches()]
    return run(sharded(network()), batches, **DIFFERENCE)


@scenario
def fsdp_on_a_mesh_of_two_dimensions() -> dict[str, Any]:
    """Replicated over the first, sharded over the second (HSDP)."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return run(sharded(network(), mesh), **DIFFERENCE)


@scenario
def fsdp_falls_back() -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(sharded(network()))
    said = [str(w.message) for w in caught if "finite difference" in str(w.message)]
    return found | {"said": said}


@scenario
def fsdp_batchnorm() -> dict[str, Any]:
    return run(sharded(network(batchnorm=True)), **DIFFERENCE)


@scenario
def ddp_batchnorm() -> dict[str, Any]:
    model = network(batchnorm=True)
    with warnings.catch_warnings():  # newer versions have another name for it
        warnings.simplefilter("ignore", FutureWarning)
        model = DistributedDataParallel(model, broadcast_buffers=False)
    return run(model, **DIFFERENCE)


def statistics_of_the_average(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """Running statistics as a checkpoint and a test have them, and as `update_bn` finds them."""
    criterion, batches = nn.CrossEntropyLoss(), mine()

    def made() -> tuple[nn.Module, adler.AdlerScheduleFree]:
        model = wrap(network(batchnorm=True))
        return model, adler.AdlerScheduleFree(model.parameters(), model, criterion, **DIFFERENCE)

    model, optimizer = made()
    train(model, optimizer, batches[:5], criterion)
    in_training = [b.clone() for b in model.buffers()]
    saved = {name: whole(t) for name, t in model.state_dict().items()}
    untouched = all(a.equal(b) for a, b in zip(in_training, model.buffers(), strict=True))
    outputs_in_a_test(model.eval())  # back in training mode
    model.eval()
    tested = {name: whole(t) for name, t in model.state_dict().items()}
    right = network(batchnorm=True)
    right.load_state_dict({name.removeprefix("module."): t for name, t in tested.items()})
    update_bn([x for ((x, _),) in batches[:5]], right)
    model.train()
    after = train(model, optimizer, batches[5:], criterion)["params"]
    model, optimizer = made()
    return {
        "saved": list(saved.values()),
        "tested": list(tested.values()),
        "right": list(right.buffers())[:2],
        "found": [t for name, t in saved.items() if "running" in name],
        "untouched": untouched,
        "after": after,
        "without": train(model, optimizer, batches, criterion)["params"],
    }


@scenario
def ddp_statistics_of_the_average() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return statistics_of_the_average(
            lambda model: DistributedDataParallel(model, broadcast_buffers=False)
        )


@scenario
def ddp_statistics_of_rank_0() -> dict[str, Any]:
    """By default those of rank 0 are everybody's."""
    return statistics_of_the_average(DistributedDataParallel)


@scenario
def fsdp_statistics_of_the_average() -> dict[str, Any]:
    return statistics_of_the_average(sharded)


@scenario
def fsdp_uneven_statistics_of_the_average() -> dict[str, Any]:
    """The longer share fills the memory for batches sooner: the ranks have kept unequal numbers."""
    model, criterion = sharded(network(batchnorm=True)), nn.CrossEntropyLoss()
    optimizer = adler.AdlerScheduleFree(model.parameters(), model, criterion, **DIFFERENCE)
    rank, before = dist.get_rank(), running_statistics._BUDGET
    running_statistics._BUDGET = 800
    try:
        batches = [[uneven_shares(x, y)[rank]] for x, y in joint_batches()[:5]]
        train(model, optimizer, batches, criterion)
        kept = len(optimizer._statistics._batches)
        return {"kept": kept, "saved": [whole(t) for t in model.state_dict().values()]}
    finally:
        running_statistics._BUDGET = before


@scenario
def ddp_saved_by_one_rank() -> dict[str, Any]:
    """One rank saves, and waits for nobody; the other one trains on."""
    model, criterion = DistributedDataParallel(network(batchnorm=True)), nn.CrossEntropyLoss()
    optimizer = adler.AdlerScheduleFree(model.parameters(), model, criterion, **DIFFERENCE)
    train(model, optimizer, mine()[:5], criterion)
    saved = copy.deepcopy(model.state_dict()) if dist.get_rank() == 0 else {}
    found = train(model, optimizer, mine()[5:], criterion)
    return found | {"saved": saved}


@scenario
def synchronised_statistics_of_one_rank() -> dict[str, Any]:
    """`SyncBatchNorm` trains on accelerators only; statistics are found by each rank alone."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(batchnorm=True))
    statistics = RunningStatistics(model, 4)
    batches = [x for ((x, _),) in mine()[:4]]
    for x in batches:
        statistics.see((x,), {})
    forward = model[1].forward
    found = statistics.at({}) if dist.get_rank() == 0 else {}
    right = network(batchnorm=True)
    update_bn(batches, right)
    return {
        "found": list(found.values()),
        "right": list(right.buffers())[:2],
        "synchronises": model[1].forward == forward and "forward" not in vars(model[1]),
    }


@scenario
def fsdp_validated_between() -> dict[str, Any]:
    """A forward without gradients leaves the root's parameters gathered."""
    model, criterion = sharded(network()), nn.CrossEntropyLoss()
    optimizer = adler.Adler(model.parameters(), model, criterion, **DIFFERENCE)

    def validate() -> None:
        with torch.no_grad():
            model(torch.zeros(2, 4, dtype=torch.float64))

    return train(model, optimizer, mine(), criterion, before_step=validate)


@scenario
def fsdp_replay_that_fails() -> dict[str, Any]:
    model, criterion = sharded(network()), nn.CrossEntropyLoss()
    failing = False

    def fail(*_: Any) -> None:
        if failing and is_replaying():
            raise KeyError("in the middle of the replay")

    model[2].register_forward_hook(fail)
    optimizer = adler.Adler(model.parameters(), model, criterion, **DIFFERENCE)
    train(model, optimizer, mine()[:2], criterion)
    before = [whole(p) for p in model.parameters()]
    average = optimizer.param_groups[0]["rate_total"]
    failing, said = True, ""
    try:
        train(model, optimizer, mine()[2:3], criterion)
    except RuntimeError as error:
        said = str(error)
    after = [whole(p) for p in optimizer.param_groups[0]["params"]]
    return {
        "said": said,
        "same": all(a.equal(b) for a, b in zip(before, after, strict=True))
        and average is optimizer.param_groups[0]["rate_total"],
    }


@scenario
def fsdp_one_loss_infinite() -> dict[str, Any]:
    batches = mine()
    if dist.get_rank() == 1:
        batches[3][0][1][0] = -1
    model, criterion = sharded(network()), Barrier()
    optimizer = adler.Adler(model.parameters(), model, criterion, **DIFFERENCE)
    return train(model, optimizer, batches, criterion)


@scenario
def fsdp_several_meshes() -> dict[str, Any]:
    model = network()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("a",)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("b", "c")))
    return refused(lambda: run(model, **DIFFERENCE))


KINDS = {"sgd": adler.Adler, "adam": adler.AdlerAdam}


def save(kind: str, folder: Path) -> dict[str, Any]:
    """Half of the run, a checkpoint, the other half."""
    model, criterion = sharded(network()), nn.CrossEntropyLoss()
    optimizer = KINDS[kind](model.parameters(), model, criterion, **DIFFERENCE)
    train(model, optimizer, mine()[: STEPS // 2], criterion)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / kind)
    return train(model, optimizer, mine()[STEPS // 2 :], criterion)


def resume(kind: str, folder: Path) -> dict[str, Any]:
    """The other half from the checkpoint, on this many ranks."""
    model, criterion = sharded(network()), nn.CrossEntropyLoss()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = KINDS[kind](model.parameters(), model, criterion, **DIFFERENCE)
    weights, state = get_state_dict(model, optimizer)
    assert optimizer.last_step is None  # asking for the state was not a step
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / kind)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return train(model, optimizer, mine()[STEPS // 2 :], criterion)


def main(what: str, out: Path, checkpoint: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if what == "scenarios":
        found = {name: function() for name, function in SCENARIOS.items()}
        found |= {f"save_{kind}": save(kind, checkpoint) for kind in KINDS}
    else:
        found = {f"resume_{kind}": resume(kind, checkpoint) for kind in KINDS}
    torch.save(found, out / f"{what}-{dist.get_world_size()}-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
