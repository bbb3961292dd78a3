"""Several processes: DistributedDataParallel, or FSDP2 with a checkpoint.

torchrun --standalone --nproc-per-node 2 -m examples.programs.ddp --mode ddp
torchrun --standalone --nproc-per-node 2 -m examples.programs.ddp --mode fsdp --checkpoint DIR
"""

from __future__ import annotations

import argparse
import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import adler
from examples.programs.loop import blobs, network


def wrapped(mode: str, device: torch.device) -> nn.Module:
    """The model on this rank."""
    torch.manual_seed(0)
    model = network().to(device)
    if mode == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main(mode: str, epochs: int, checkpoint: str | None) -> None:
    """Joins the others, trains, and leaves them."""
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", dist.get_rank()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    train(mode, epochs, checkpoint, device)
    # The wrapper must not outlive the process group: freed later, it can hang in gloo's thread.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def train(mode: str, epochs: int, checkpoint: str | None, device: torch.device) -> None:
    """Trains on this rank's share."""
    rank = dist.get_rank()
    model, criterion = wrapped(mode, device), nn.CrossEntropyLoss()
    # Shards have no forward-mode derivative: without this one warning says so.
    measure = adler.Measure() if mode == "ddp" else adler.Measure.low_cost()
    optimizer = adler.Adler(model.parameters(), model, criterion, measure=measure)

    data = TensorDataset(*blobs(500, seed=1))
    sampler: DistributedSampler[object] = DistributedSampler(data)  # as many batches on every rank
    loader = DataLoader(data, batch_size=64, sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
        rate = float(optimizer.param_groups[0]["effective_lr"])
        print(f"rank {rank}, epoch {epoch}: loss {float(loss.detach()):.3f}, rate {rate!r}")

    if checkpoint is not None:
        weights, state = get_state_dict(model, optimizer)
        state_dict_saver.save({"model": weights, "optimizer": state}, checkpoint_id=checkpoint)
        # Resuming, on any number of processes:
        weights, state = get_state_dict(model, optimizer)
        state_dict_loader.load({"model": weights, "optimizer": state}, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--checkpoint", help="where to save, and load from again")
    options = parser.parse_args()
    main(options.mode, options.epochs, options.checkpoint)
