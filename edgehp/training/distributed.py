"""Several processes as one: launched by torchrun, on gloo (CPU) or NCCL (GPU).

A run over W processes takes the steps that one process would take on the union of the batches:
each process gets its share of every batch, gradients are averaged, and batch normalisation takes
its statistics over all processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from edgehp.errors import UsageError


@dataclass(frozen=True)
class Place:
    """This process among the others."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


@contextmanager
def distributed(device: str) -> Iterator[Place]:
    """Join the process group that torchrun's environment describes, if there is one.

    Args:
        device: ``"cuda"`` takes NCCL and the GPU of this process's local rank, else gloo.

    Raises:
        UsageError: torchrun's variables are incomplete.
    """
    if "WORLD_SIZE" not in os.environ:
        yield Place()
        return
    try:
        place = Place(
            int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
        )
    except (KeyError, ValueError) as e:
        raise UsageError(
            f"WORLD_SIZE is set but {e} is not right; start several processes with torchrun"
        ) from e
    if device.startswith("cuda"):
        torch.cuda.set_device(place.local_rank)
    # torchrun's agent keeps one store over all restarts: without a prefix of its own, a restarted
    # process finds the address of the one that was killed there.
    store, _, _ = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        store=PrefixStore(f"attempt-{attempt}", store),
        rank=place.rank,
        world_size=place.world,
    )
    try:
        yield place
    finally:
        dist.destroy_process_group()


def gathered(value: Tensor, world: int) -> list[float]:
    """A number of every process, in the order of their ranks; all must ask for it."""
    found = [torch.zeros_like(value) for _ in range(world)]
    dist.all_gather(found, value)
    return [float(v) for v in found]


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """`network`, changed in place to shared batch statistics, wrapped to average its gradients."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SharedBatchNorm2d  # names unchanged
    ids = [device.index] if device.type == "cuda" and device.index is not None else None
    return nn.parallel.DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)


class _SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch statistics over all processes; torch's own SyncBatchNorm runs on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        # Sums in float32: a bf16 sum over a batch of feature maps loses its small terms.
        values = x.float()
        sums = torch.stack([values.sum((0, 2, 3)), (values * values).sum((0, 2, 3))])
        count = values.new_tensor(float(values.numel() // values.shape[1]))
        packed = _SumOverProcesses.apply(  # type: ignore[no-untyped-call]
            torch.cat([sums.flatten(), count[None]])
        )
        total = packed[-1].detach()
        mean, square = (packed[:-1] / total).view(2, -1)
        variance = (square - mean * mean).clamp_min(0)
        self._remember(mean.detach(), variance.detach() * total / (total - 1))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        shift = self.bias - mean * scale
        out: Tensor = (values * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
        return out

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.momentum is None:
            return
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: every process's loss sees the shared sums."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor) -> Tensor:
        out = values.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        out = gradient.clone()
        dist.all_reduce(out)
        return out
