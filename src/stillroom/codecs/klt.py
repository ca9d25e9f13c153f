"""The best linear codec of square blocks, in closed form: the Karhunen-Loeve transform (PCA) of their pixels.

With y = x - mean the pixels of a block and C = E[y y^T] = sum_i l_i b_i b_i^T, l_1 >= l_2 >= ..., the code is
(b_1 . y, ..., b_K . y); no other K linear numbers leave less than its squared error, the sum of l_i for i > K. It is
fitted in a second, so it is the bar for learned codecs of its size, and a deterministic teacher.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.codecs.codec import Codec, checked, require_signed
from stillroom.data import LatentSpace
from stillroom.nets.build import buildable
from stillroom.settings import Refusal


class Blocks(nn.Module):
    """The basis and the mean block, as both halves hold them. Buffers: nothing in them is learned by descent."""

    basis: Tensor
    mean: Tensor

    def __init__(self, channels: int, block: int):
        super().__init__()
        self.block = block
        self.register_buffer("basis", torch.zeros(channels, 3, block, block))
        self.register_buffer("mean", torch.zeros(3, block, block))


@buildable
class BlockEncoder(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        bias = -torch.einsum("kcij,cij->k", self.basis, self.mean)
        return functional.conv2d(x, self.basis, bias, stride=self.block)      # [B, 3, H, W] -> [B, K, H / b, W / b]


@buildable
class BlockDecoder(Blocks):
    def forward(self, z: Tensor) -> Tensor:
        x = functional.conv_transpose2d(z, self.basis, stride=self.block)
        return x + self.mean.tile(1, z.shape[-2], z.shape[-1])


def fit_klt(images: Tensor | Iterable[Tensor], block: int = 8, channels: int = 16) -> Codec:
    """Of pictures [B, 3, H, W] in [-1, 1], or of several such batches of any sizes; blocks cut through are left out.
    Latents have deviation 1 in every channel."""
    size = 3 * block * block
    if not 0 < channels <= size:
        raise Refusal(f"a KLT of {block}x{block} blocks has 1 to {size} channels, not {channels}")
    mean, covariance = moments([images] if isinstance(images, Tensor) else images, block)
    values, vectors = torch.linalg.eigh(covariance)
    basis = _signed(vectors.flip(1).T[:channels])
    # A channel without variance (there are some when all pictures are grey) is not blown up by its normaliser.
    scale = values.flip(0)[:channels].clamp(min=1e-8 * float(values[-1])).sqrt()
    halves = BlockEncoder(channels, block), BlockDecoder(channels, block)
    for half in halves:
        half.basis.copy_(basis.view(channels, 3, block, block))
        half.mean.copy_(mean.view(3, block, block))
    space = LatentSpace(channels, block, (0.0,) * channels, tuple(scale.tolist()), (block - 1) / 2)
    return Codec(*halves, space).eval()


def equal_budget(images: Tensor | Iterable[Tensor], scale: float, block: int = 8, channels: int = 16) -> Codec:
    """The KLT with as many latents per picture as one of `channels` has on pictures enlarged by `scale`: what enlarging
    gains over this, it does not gain by having more latents."""
    return fit_klt(images, block, min(max(1, round(channels * scale**2)), 3 * block * block))


def moments(images: Iterable[Tensor], block: int) -> tuple[Tensor, Tensor]:
    """Mean [N] and covariance [N, N] of the pixels of blocks, N = 3 b b, in float64. Holds one batch at a time."""
    size = 3 * block * block
    count, total = 0, torch.zeros(size, dtype=torch.float64)
    products = torch.zeros(size, size, dtype=torch.float64)
    low, high = 0.0, 0.0
    for batch in images:
        x = checked(batch).detach().cpu()
        height, width = (n - n % block for n in x.shape[-2:])
        low, high = min(low, float(x.min())), max(high, float(x.max()))
        if not height * width:
            continue
        rows = functional.unfold(x[..., :height, :width], block, stride=block)                  # [B, N, blocks]
        for part in rows.transpose(1, 2).reshape(-1, size).split(1 << 16):
            part = part.double()
            count, total = count + len(part), total + part.sum(0)
            products += part.T @ part
    if not count:
        raise Refusal(f"KLT: no picture holds a block of {block}x{block} pixels; give larger ones")
    require_signed(torch.tensor([low, high]), "KLT")        # of all together: one bright picture has no dark pixel
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    if float(covariance.diagonal().max()) < 1e-10:
        raise Refusal("KLT: all blocks are the same; give photographs")
    return mean, covariance


def _signed(basis: Tensor) -> Tensor:
    """eigh leaves the sign of a vector open. Here its product with one fixed irregular vector is positive: its largest
    entry would not do, which a symmetric vector has twice, once with each sign."""
    i = torch.arange(basis.shape[1], dtype=basis.dtype)
    return basis * torch.where(basis @ torch.cos(i * i + 1) < 0, -1.0, 1.0)[:, None]
