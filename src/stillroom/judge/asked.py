"""What commands that draw, measure and compare are asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillroom.settings import Count, Natural, Positive, Share, Where, given


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How samples are drawn."""

    seed: int = 0
    steps: Count | None = None
    """Sampler steps; what the run's settings say unless given."""
    guidance: float = 1.0
    weak: Where = ""
    """A poorer model of the same data that guidance leads away from: another run, or `early`, the earlier average that
    some one-step runs keep. Unless given, the model itself without the label."""
    interval: tuple[Share, Share] = (0.0, 1.0)
    """Part of the way to noise on which guidance acts, for flows; 0 is data."""
    batch: Count = 256
    codec: Where = ""
    """Decodes latents: the codec that made those on which the run was trained."""
    device: str = "auto"


def flags_given(settings: Drawing, *names: str) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in given(settings, *names))


@dataclass(frozen=True, kw_only=True)
class Evaluation(Drawing):
    data: Where = ""
    """The reference: what the run was trained on, or other data of its kind. Only with --stats may it be left out."""
    heldout: Where = ""
    """Fresh real data for the floor. Unless given, the data's :test split; where there is none, a part of the data that
    is set aside. Of a mixture, the :test splits of all its parts."""
    n: Count | None = None
    """Samples: 2000 of a run, all that are there of a file or folder, unless given."""
    reference: Count = 50_000
    """Real ones, at most."""
    size: Natural = 0
    """Pixels a side to which pictures of the data are cropped; as large as the samples unless given."""
    bad_share: Share = 0.01
    labels: Literal["balanced", "data"] = "balanced"
    """Of which classes samples are drawn: equally of all, or as the data have them."""
    features: Where = ""
    """A run of `stillroom train features`: distances in its pooled features too."""
    inception: Path | None = None
    """Weight file of FID's Inception, pt_inception-2015-12-05-6726825d.pth: distances in its features too."""
    stats: Path | None = None
    """Statistics of a reference set: pytorch-fid's .npz, ADM's reference batch, or what --save-stats wrote."""
    save_stats: Path | None = None
    """Write the data's statistics, in the last of the feature spaces, to this .npz."""
    teacher: Where = ""
    """A flow: how far samples lie from where its trajectories lead from the same noise."""
    prompts: Where = ""
    """Of a text-to-image teacher: what `stillroom cache --prompts` wrote."""
    out: Path | None = None
    """Write all figures to this .json."""


@dataclass(frozen=True, kw_only=True)
class OfCodecs:
    data: Where
    """Pictures: a folder, a parquet file, or one of digits, shapes, leaves, photos."""
    heldout: Where = ""
    """Pictures that codecs are judged on. Unless given, the data's :test split; where there is none, a part of the data
    that is set aside. Of a mixture, the :test splits of all its parts."""
    size: Count | None = None
    """Pixels a side; those that the first codec's run learned from, unless given."""
    crop: Literal["centre", "random", "shrink"] = "centre"
    """How pictures become squares; random ones are drawn once and for all."""
    shrink: tuple[Positive, Positive] = (1.0, 8.0)
    """With crop shrink: least and most pixels of the original per pixel."""
    bad_share: Share = 0.01
    out: Path = Path("compare")
    """Folder of the page, and of what was measured; or FILE.html, the page, with the folder FILE beside it."""
    pictures: Count = 10_000
    """That a prior learns from, and that its samples are held against, at most."""
    n: Count = 2000
    """Held-out pictures, and samples of each prior at each look, at most."""
    steps: Count = 3000
    """Of the prior of each codec, which is looked at after a quarter, a half and all of them."""
    batch: Count = 64
    width: Count = 96
    """Of the prior, a DiT."""
    depth: Count = 4
    tokens: Count = 4
    """A side of the prior's, at most: latents are taken together so that every codec's prior has about as many. More of
    them see more, at their square's cost; 16 is usual for pictures of 256 pixels."""
    rate: Positive = 1e-3
    sampler_steps: Count = 8
    """Of Heun's method."""
    guidance: float = 1.5
    """Samples are drawn without guidance and, where there are labels, with this much; 1 leaves it out."""
    features: Where = ""
    """A run of `stillroom train features` on such pictures: Fréchet distances are in its features. Random features
    stand in, unless given."""
    inception: Path | None = None
    """Weight file of FID's Inception, pt_inception-2015-12-05-6726825d.pth: Fréchet distances are in its features."""
    lpips: Where = ""
    """Folder with public weight files of LPIPS."""
    reference: tuple[str, ...] = ()
    """Laws that latents were brought to: gaussian, gmm:16, noised:0.3, samples:FILE or a flow; NAME=REFERENCE is of
    one codec, any other of all. Drawn from --seed, where one is drawn. A product of dmvae knows its own, with its seed
    and the units that it stands in: give another place of it, another law, or NAME=none to leave it out."""
    base: tuple[str, ...] = ()
    """NAME=CODEC: where the codec lies that a product of dmvae began with, if not where it did; noised:0.3 wants it."""
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class OfRuns:
    data: Where = ""
    """What samples are held against. Unless given, samples of the teacher; of a mixture, draws of it."""
    heldout: Where = ""
    """Fresh real data for the floor. Unless given, the data's :test split; where there is none, a part of the data that
    is set aside. Of a mixture, the :test splits of all its parts."""
    out: Path = Path("compare")
    """Folder of the page, and of what was measured; or FILE.html, the page, with the folder FILE beside it."""
    teacher: Where = ""
    """Unless given, the one that the runs name."""
    prompts: Where = ""
    """Of a text-to-image teacher: what `stillroom cache --prompts` wrote. Unless given, those that the runs name."""
    teacher_steps: tuple[Count, ...] = (1, 2, 8)
    """At which the teacher is drawn from, beside its own."""
    n: Count = 2000
    """Samples of each; as many as there are, where points are fewer."""
    reference: Count = 50_000
    """Real ones, at most; of the teacher, where it stands for data, 5000 at most."""
    size: Natural = 0
    """Pixels a side to which pictures of the data are cropped; as large as the samples unless given."""
    bad_share: Share = 0.01
    features: Where = ""
    """A run of `stillroom train features`: distances in its pooled features too."""
    inception: Path | None = None
    """Weight file of FID's Inception, pt_inception-2015-12-05-6726825d.pth: distances in its features too."""
    codec: Where = ""
    """Decodes latents: the codec that made those on which the runs were trained."""
    seed: int = 0
    """Of the noise, which all share."""
    batch: Count = 256
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    against: tuple[Where, ...] = ()
    """Other places, to stand beside it."""
    flow: tuple[Where, ...] = ()
    """A flow made on the place's latents or pictures, whose trajectories are followed; with --against one for each
    place, in their order."""
    data: Where = ""
    """Pictures that a codec encodes."""
    bad_share: Share = 0.01
    size: Count | None = None
    """Pixels a side of pictures; those that a codec's run learned from, unless given."""
    n: Count = 2000
    """Samples, at most."""
    temperatures: tuple[Positive, ...] = (0.02, 0.05, 0.2)
    """Of the kernel, in units of the mean distance."""
    particles: Count = 64
    """Samples that a kernel weighs: the positives of a group."""
    wanted: Share = 0.5
    """Share of the particles that the temperature to be recommended lets count."""
    guidance: float = 1.0
    """Of the flow or generator whose samples are measured."""
    steps: Count | None = None
    """Of its sampler."""
    flow_steps: Count = 32
    """Along the trajectories that are followed; each costs two evaluations."""
    flow_samples: Count = 128
    batch: Count = 64
    seed: int = 0
    device: str = "auto"
    out: Path | None = None
    """FILE.html: the page; everything measured goes to FILE.json beside it."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    data: Where
    """Pictures that nothing was trained on: a folder, files, a parquet, photos:test or leaves:test."""
    sizes: str = "64,128,256,512,1024"
    """Pixels a side of the squares. A size above a picture's short side leaves that picture out."""
    scales: str = "0.5,1,1.25,1.5,2,3"
    """Of remapping; 1 is always among them."""
    teacher: Where = ""
    """`bundled`, a run, a diffusers folder or hub id, or a TAESD weight file; the one on the student's card, unless
    given."""
    scratch: Where = ""
    """A codec trained without a teacher, to stand beside them."""
    recon_only: Where = ""
    """A codec whose encoder learned through the teacher's decoder from pixels alone."""
    linear: Where = ""
    """Pictures that the linear codes klt and klt-budget are fitted on; those that choose the scale, unless given."""
    without: str = ""
    """Contenders to leave out: teacher-bf16, teacher-int8, klt, klt-budget."""
    limit: Count | None = None
    """Pictures, at most."""
    most_latents: Positive | None = None
    """The chosen scale spends at most this many times the native number of latents."""
    most_ms: Positive | None = None
    """The chosen scale encodes one picture of the largest size in at most this many milliseconds."""
    save: bool = False
    """Write the chosen scale into the run's product."""
    lpips: Where = ""
    """Folder with public weight files of LPIPS; random features stand in, unless given."""
    inception: Where = ""
    """Public weight file of FID's Inception; random features stand in, unless given."""
    out: Path | None = None
    """Folder of the results; RUN/sweep, unless given."""
    tile: Natural = 1024
    """Pixels a side of the tiles in which codecs take larger pictures; 0 takes any picture whole."""
    device: str = "auto"
