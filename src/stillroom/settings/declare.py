"""The settings that recipes share. A recipe's own settings extend `Run` (and `Images` when it reads data)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillroom.settings.limits import Count, Decay, Natural, NotNegative, Positive, Share, Where


@dataclass(frozen=True)
class Optimizer:
    """How one role learns. The schedule counts the role's own updates, warm-up included."""

    lr: NotNegative
    name: Literal["adamw", "adam", "sgd", "adamw8bit"] = "adamw"
    """adamw8bit keeps its two moments in 8 bits, through bitsandbytes; sgd's momentum is the first of betas."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.0
    clip: NotNegative = 0.0
    """Largest gradient norm of the whole role; 0 leaves gradients as they are."""
    warmup: Natural = 0
    """Updates over which the rate rises linearly from 0."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """What the rate does after the warm-up; it would be 0 one update after the role's last."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every run has, whatever it trains."""

    out: Path
    """The run folder: settings, metrics, checkpoints, samples, product, report."""
    steps: Count
    """Steps of training, which stages may share; stages with a setting of their own (encoder_steps) come on top."""
    seed: int = 0
    batch: Count = 64
    """The global batch of one step, over all processes and accumulated micro-batches."""
    accumulate: Count = 1
    """Micro-batches that one step adds up."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto times both at the first start and keeps the faster."""
    device: str = "auto"
    shard: bool = False
    """Shard every role over the processes (FSDP2) instead of copying it."""
    offload: bool = False
    """Keep networks that do not learn, the teacher above all, in the processor's memory, and copy them to the
    accelerator for each answer."""
    checkpoint_every: Natural = 0
    """Steps between checkpoints; 0 writes eight in a run, at least every 1000 steps."""
    keep: Count = 2
    """Checkpoints kept beside the best one."""
    log_every: Count = 20
    sample_every: Natural = 0
    """Steps between sample pictures; 0 draws one at the end only."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"


@dataclass(frozen=True, kw_only=True)
class Images:
    """Where images come from, and how each becomes a square of `size` pixels."""

    data: Where
    """A folder, a parquet file, a tar, a latent store, or one of: digits, shapes, leaves, photos; `:test` behind it is
    another split than train. `datasets:` before a folder, or before a name on the hub, has `datasets` load it. Several
    are mixed by `photos+leaves`, or by weight: `0.7*photos+0.3*leaves`."""
    size: Count | None = None
    """Pixels a side of the squares. Latent stores and digits have a size of their own."""
    crop: Literal["centre", "random", "shrink"] = "centre"
    """centre and random scale the shorter side to `size` first. shrink takes a random square of the original and
    shrinks it to `size`: the resolution that is trained on is then drawn too. The builtin photos are always cut so, at
    every scale unless --shrink narrows it."""
    shrink: tuple[Positive, Positive] = (1.0, 8.0)
    """With crop shrink: least and most pixels of the original per pixel of the square, uniform in the logarithm. Where
    the least asks for more than a picture has, the square is all that fits, and may be enlarged."""
    flip: bool = False
    bad_share: Share = 0.01
    """Share of unreadable images above which the run stops; up to it others take their place."""
