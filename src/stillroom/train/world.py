"""The processes of a run. Any launcher that sets RANK and WORLD_SIZE will do: accelerate, torchrun, SLURM wrappers."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from stillroom.settings import Refusal

_BUCKET = 25 * 2**20
"""Elements reduced in one call: few calls, and no second copy of a large model's gradients."""


class _Gather(torch.autograd.Function):
    """All processes' rows; a row's gradient is the sum of what every process made of it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x / self.size

    def gather(self, x: Tensor) -> Tensor:
        """The rows of process 0, then 1, ...; with gradient."""
        return x if self.size == 1 else _Gather.apply(x)  # pyright: ignore[reportReturnType]

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Mean gradients over processes, in buckets. A parameter that no process used keeps no gradient."""
        if self.size == 1 or not parameters:
            return
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        dist.all_reduce(used)
        bucket: list[Tensor] = []
        for p, uses in zip(parameters, used.tolist(), strict=True):
            if uses:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                bucket.append(p.grad)
            if sum(g.numel() for g in bucket) > _BUCKET:
                self._reduce(bucket)
                bucket = []
        self._reduce(bucket)

    def _reduce(self, bucket: list[Tensor]) -> None:
        if not bucket:
            return
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat)
        flat /= self.size
        for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(part.view_as(g))

    def same(self, value):
        """The first process's value, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def each(self, value) -> list:
        """Every process's value, in their order."""
        box = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(box, value)
        return box

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def patience(self) -> Iterator[Callable[[], object]]:
        """A wait for work of hours: the usual one gives up after minutes, and on an accelerator keeps it busy."""
        if self.size == 1:
            yield lambda: None
            return
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        yield lambda: dist.barrier(group)  # pyright: ignore[reportArgumentType]
        dist.destroy_process_group(group)  # pyright: ignore[reportArgumentType]


def pick_device(name: str) -> torch.device:
    """`cuda` without a number is this process's own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise Refusal("device 'meta' holds no numbers: nothing can be trained on it")
    return device


@contextmanager
def open_world(device: str = "auto") -> Iterator[World]:
    """Joins the launcher's processes, and leaves them the way that does not abort (barrier, collect, destroy)."""
    size, chosen = int(os.environ.get("WORLD_SIZE", 1)), pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)       # what is seeded, waited for and reduced is the current device's
    if size == 1:
        yield World(0, 1, chosen)
        return
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    yield World(dist.get_rank(), size, chosen)
    if mine:  # not on an error: the other processes would wait for a barrier that never comes
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()
