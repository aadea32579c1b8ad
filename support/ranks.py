"""The processes of a torchrun job: shares of the work, sums over ranks, sharded weights."""

import os

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from support.checkpoint import find_weights, read_weights
from support.files import check
from support.machine import find_device


def start_ranks(device: str, shard: bool = False) -> torch.device:
    """This rank's device. Joins the other ranks if torchrun started this process; `shard` needs that."""
    if "LOCAL_RANK" not in os.environ:
        check(not shard, "--shard cuts the weights into one part a rank: start train.py with torchrun")
        return find_device(device)
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(local)
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default, whatever the machine has
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    return find_device(f"cuda:{local}" if on_gpu else device)


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def first_rank() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def say(*words):
    """Print a line, once however many ranks there are."""
    if first_rank():
        print(*words, flush=True)


def share(items: list) -> list:
    """This rank's part of a list that all ranks hold."""
    return items[rank() :: ranks()]


def share_passes(micro_batches: list[list[int]]) -> list[list[int]]:
    """The micro-batches of this rank. All ranks get equally many, some empty: sharded weights need all of them."""
    return share(micro_batches + [[] for _ in range(-len(micro_batches) % ranks())])


def gather(value) -> list:
    """The values of all ranks, in their order, on each of them."""
    values = [value] * ranks()
    if distributed.is_initialized():
        distributed.all_gather_object(values, value)
    return values


def sum_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Add up each of `tensors`, all of one dtype, over the ranks, in place and in one message; returns them."""
    if distributed.is_initialized():
        distributed.all_reduce(message := parameters_to_vector(tensors))
        vector_to_parameters(message, tensors)
    return tensors


def shard(model: nn.Module, probed: nn.Module, device: torch.device):
    """Cut the frozen weights of `model`, on the meta device, into one part a rank (FSDP2), and read this rank's part.

    A layer's weights are whole while it computes. Adapters stay whole; draw them after this. The `probed` layer, the
    embedding and the head are used outside their forward pass, so they stay whole until the backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.init_device_mesh(device.type, (ranks(),))
    adapters = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=part not in (probed, model), ignored_params=adapters)
    model.to_empty(device=device)
    model.tie_weights()
    read_weights(model, find_weights(model.folder, model.config))


def add_flags(parser):
    add = parser.group("machine")
    say = "keep only the input of each layer for the backward pass: same result, less memory, a third slower"
    add("--gradient-checkpointing", action="store_true", help=say)
    say = "put samples behind one another in one row, without padding: for a GPU, and samples of many lengths"
    add("--pack", action="store_true", help=say)
    add("--compile", action="store_true", help="compile the layers: faster on a GPU, after a slow first step")
    say = "with torchrun: cut the frozen weights into one part a rank (FSDP2), for a model too large for one device"
    add("--shard", action="store_true", help=say)
