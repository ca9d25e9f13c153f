"""Checkpoints: everything that a run needs to go on as if nothing had happened, in one folder written atomically.

    checkpoints/step-00000500/{roles,optimizers,averages,memory}.safetensors, state.json, manifest.json
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillroom.settings import Refusal, nearest
from stillroom.settings.files import folder_written_atomically, read_json, sha256, write_atomically
from stillroom.train.learner import Learner

Groups = dict[str, dict[str, Tensor]]


def full(x: Tensor) -> Tensor:
    """A tensor as one process would hold it. On a sharded one this is a collective: every process must call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # pyright: ignore


@torch.no_grad()
def fill(mine: Tensor, saved: Tensor) -> None:
    """Copies a full tensor into a plain or a sharded one."""
    if hasattr(mine, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        saved = distribute_tensor(saved.to(mine.device), mine.device_mesh, mine.placements)  # pyright: ignore
    mine.copy_(saved)


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, without copies."""
    return dict(module.state_dict(keep_vars=True))


def role_state(learner: Learner) -> dict[str, Tensor]:
    """What the role can change: its own parameters, and its module's buffers."""
    parameters = dict(learner.role.module.named_parameters())
    state = named_state(learner.role.module)
    return {n: v for n, v in state.items() if n in learner.parameters or n not in parameters}


def optimizer_state(learner: Learner) -> dict[str, Tensor]:
    """{"parameter/key": tensor}; before the first update there is none."""
    state = learner.optimizer.state
    return {
        f"{name}/{key}": torch.as_tensor(value)     # of bitsandbytes the count is a plain number
        for name, p in learner.parameters.items()
        for key, value in state.get(p, {}).items()
        if isinstance(value, Tensor | int)
    }


def load_optimizer_state(learner: Learner, saved: Mapping[str, Tensor]) -> None:
    for name, p in learner.parameters.items():
        mine = {k.rpartition("/")[2]: v for k, v in saved.items() if k.rpartition("/")[0] == name}
        for key, value in mine.items():
            learner.optimizer.state[p][key] = restored(p, value)


def restored(p: Tensor, saved: Tensor) -> Tensor | int:
    """A value of the optimizer's state for a parameter. Fused forms keep their counts beside it."""
    if saved.ndim == 0 and saved.dtype == torch.int64:
        return int(saved)
    if saved.shape != p.shape or saved.ndim == 0:
        return saved.to(p.device, copy=True)
    fill(like := torch.zeros_like(p, dtype=saved.dtype), saved)
    return like


def collect(learners: Mapping[str, Learner], memory: Mapping[str, nn.Module | Tensor]) -> Groups:
    """All tensors by file, then by "role/name". Live tensors, not copies."""
    groups: Groups = {"roles": {}, "optimizers": {}, "averages": {}, "memory": {}}
    averages: set[int] = set()
    for name, learner in learners.items():
        groups["roles"] |= {f"{name}/{k}": v for k, v in role_state(learner).items()}
        groups["optimizers"] |= {f"{name}/{k}": v for k, v in optimizer_state(learner).items()}
        if (average := learner.role.average) is not None and id(average) not in averages:
            averages.add(id(average))                                   # two roles may share one
            own = {id(p) for p in learner.role.module.parameters()}     # whose parameters it may share
            groups["averages"] |= {f"{name}/{k}": v for k, v in named_state(average).items() if id(v) not in own}
    for name, thing in memory.items():
        state = {"": thing} if isinstance(thing, Tensor) else named_state(thing)
        groups["memory"] |= {f"{name}/{k}": v for k, v in state.items()}
    return groups


def frozen_digest(learners: Mapping[str, Learner]) -> str:
    """A hash of the weights that roles hold but do not train: checkpoints leave them out, so they must not change."""
    digest = hashlib.sha256()
    for learner in learners.values():
        for name, p in learner.role.module.named_parameters():
            if not p.requires_grad:
                digest.update(name.encode())
                digest.update(full(p.detach()).cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(folder: Path, groups: Groups, state: Mapping[str, Any], writes: bool) -> None:
    """Every process gathers its shards; the first one writes."""
    whole = {
        group: {k: full(v.detach()).cpu().clone().contiguous() for k, v in tensors.items()}
        for group, tensors in groups.items()
    }
    if not writes:
        return
    with folder_written_atomically(folder) as new:
        for group, tensors in whole.items():
            save_file(tensors, new / f"{group}.safetensors")
        (new / "state.json").write_text(json.dumps(state, indent=1))
        sums = {file.name: sha256(file) for file in sorted(new.iterdir())}
        (new / "manifest.json").write_text(json.dumps(sums, indent=1))


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint on disk, or nothing."""
    try:
        sums = read_json(folder / "manifest.json")
    except Refusal as refusal:
        return str(refusal)
    if not isinstance(sums, dict) or "state.json" not in sums:
        return "manifest.json does not name its files"
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} does not have the checksum it was written with"
    return ""


def load(folder: Path, learners: Mapping[str, Learner], memory: Mapping[str, nn.Module | Tensor]) -> dict[str, Any]:
    """Restores everything in place, strictly, and returns the state. Optimizers come last: they hang on parameters."""
    state = read_json(folder / "state.json")
    for name, learner in learners.items():
        learner.updates = state["updates"].get(name, 0)
    groups = collect(learners, memory)
    for group in ("roles", "averages", "memory"):
        saved = load_tensors(folder / f"{group}.safetensors")
        match_names(groups[group], saved, f"{folder}/{group}.safetensors")
        for name, mine in groups[group].items():
            fill(mine, saved[name])
    saved = load_tensors(folder / "optimizers.safetensors")
    for name, learner in learners.items():
        prefix = f"{name}/"
        load_optimizer_state(learner, {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})
    return state


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Refusal(f"{path}: not a readable safetensors file: {error}") from None


def match_names(mine: Mapping[str, Tensor], saved: Mapping[str, Tensor], where: str) -> None:
    """Strict: the same names and shapes on both sides, or an error that names the first difference."""
    for name in saved:
        if name not in mine:
            raise Refusal(f"{where}: holds {name!r}, which this model has not{nearest(name, mine)}")
    for name, tensor in mine.items():
        if name not in saved:
            raise Refusal(f"{where}: {name!r} is missing{nearest(name, saved)}")
        if saved[name].shape != tensor.shape:
            raise Refusal(f"{where}: {name!r} is {tuple(saved[name].shape)}, this model's is {tuple(tensor.shape)}")


class Shelf:
    """The checkpoints of a run: the last `keep`, and the best."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, max(1, keep)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Of folders that have a checkpoint's name: a person may have laid a copy beside them."""
        numbers = (int(name) for p in self.folder.glob("step-*") if (name := p.name.removeprefix("step-")).isdigit())
        return sorted(step for step in numbers if self.path(step).is_dir())

    def best(self) -> dict[str, Any]:
        """{"step", "metric", "value"} of the best checkpoint, empty when no stage names a metric."""
        path = self.folder / "best.json"
        return read_json(path) if path.exists() else {}

    def offer(self, step: int, metric: str, value: float | None) -> None:
        """Marks this checkpoint as the best if its metric is the lowest so far."""
        best = self.best()
        if value is not None and (best.get("metric") != metric or value < best["value"]):
            write_atomically(
                self.folder / "best.json", json.dumps({"step": step, "metric": metric, "value": value})
            )

    def prune(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best().get("step")}
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.path(step))

    def forget_after(self, step: int) -> None:
        """Checkpoints that turned out to be damaged: the run goes on from an earlier one and will write them anew."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later))
        if self.best().get("step", 0) > step:
            (self.folder / "best.json").unlink()

    def last_good(self) -> tuple[int | None, list[str]]:
        """The newest undamaged checkpoint's step, and what was wrong with the newer ones."""
        complaints = []
        for step in reversed(self.steps()):
            if not (wrong := damage(self.path(step))):
                return step, complaints
            complaints.append(f"checkpoint {self.path(step).name} is damaged ({wrong})")
        return None, complaints
