"""How far a picture is from its reference: one value per image, [B, C, H, W] in [-1, 1] -> [B].

Pictures are taken as they are: whoever wants what a file would hold asks for `as_8bit` first. Colours count alike in
MSE, PSNR and SSIM (the mean over channels, as the tables of codecs have it); GMSD is defined on luminance.
"""

import torch
from torch import Tensor
from torch.nn import functional

from stillroom.settings import Refusal

RANGE = 2.0                                                     # from -1 to 1
LEVELS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)               # Wang et al. 2003: exponents of the five levels
WINDOW = 11
SSIM_SMALLEST = WINDOW
MS_SSIM_SMALLEST = (WINDOW - 1) * 2 ** (len(LEVELS) - 1) + 1    # 161: the window still fits the coarsest level


def as_8bit(x: Tensor) -> Tensor:
    """What is left of a picture in a file: clamped, on 256 levels, still in [-1, 1]. Halves go to the even level."""
    return (x.float().clamp(-1, 1) + 1).mul(127.5).round().div(127.5) - 1


def mse(x: Tensor, y: Tensor) -> Tensor:
    x, y = _pair(x, y)
    return (x - y).square().flatten(1).mean(1)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """In dB; inf where the two are equal."""
    return 10 * torch.log10(RANGE**2 / mse(x, y))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Wang et al. 2004: Gaussian window of 11 pixels and deviation 1.5, over the region where it fits wholly."""
    x, y = _pair(x, y, SSIM_SMALLEST)
    return torch.cat([(luminance * structure).mean((1, 2, 3)) for luminance, structure in _similarities(x, y)])


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Wang et al. 2003: structure at five levels, luminance at the coarsest.

    A picture below 161 pixels is refused: with fewer levels it would be another number under the same name. Odd sizes
    are halved by repeating the last pixel, as the authors' code does; a level of negative structure counts as 0.
    """
    x, y = _pair(x, y, MS_SSIM_SMALLEST)
    product = torch.ones(x.shape[:2], device=x.device)          # [B, C]
    for level, exponent in enumerate(LEVELS):
        x, y = (_halved(x), _halved(y)) if level else (x, y)
        last = level == len(LEVELS) - 1
        maps = [luminance * structure if last else structure for luminance, structure in _similarities(x, y)]
        product = product * torch.cat([m.mean((2, 3)) for m in maps]).clamp(min=0) ** exponent
    return product.mean(1)


def _similarities(x: Tensor, y: Tensor):
    """The two factors of SSIM, picture by picture: five maps of one picture stay in the cache, those of a batch do not
    (3 to 6 times slower). Luminance is counted from black up; variances about mid-grey, where they round least."""
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    for a, b in zip(x.split(1), y.split(1), strict=True):
        ma, mb, aa, bb, ab = _blurred(torch.cat([a, b, a * a, b * b, a * b], 1)).chunk(5, 1)
        luminance = (2 * (ma + 1) * (mb + 1) + c1) / ((ma + 1) ** 2 + (mb + 1) ** 2 + c1)
        structure = (2 * (ab - ma * mb) + c2) / (aa - ma**2 + bb - mb**2 + c2)
        yield luminance, structure


def _blurred(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H - 10, W - 10]."""
    c = x.shape[1]
    away = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    g = torch.softmax(-(away**2) / (2 * 1.5**2), 0).expand(c, 1, 1, WINDOW)
    x = x.contiguous(memory_format=torch.channels_last)         # three times faster on the CPU
    # SSIM takes differences of what is blurred, in which TF32's ten bits would be seen.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        return functional.conv2d(functional.conv2d(x, g, groups=c), g.transpose(2, 3), groups=c)


def _halved(x: Tensor) -> Tensor:
    odd = (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)
    return functional.avg_pool2d(functional.pad(x, odd, mode="replicate"), 2)


def gmsd(x: Tensor, y: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation (Xue et al. 2014); 0 for equal pictures, larger is worse.

    On 8-bit luminance averaged over 2 x 2 pixels; beyond the border there is black, as in the authors' code. Its
    standard deviation is the sample's.
    """
    x, y = _pair(x, y, 4)
    a, b = _gradient_energy(_luminance(x)), _gradient_energy(_luminance(y))
    similarity = (2 * (a * b).sqrt() + 170) / (a + b + 170)
    return similarity.flatten(1).std(1)


def _gradient_energy(grey: Tensor) -> Tensor:
    """Squared Prewitt gradient of [B, 1, H, W] in 0..255, at half the size."""
    grey = functional.pad(grey, (0, grey.shape[-1] % 2, 0, grey.shape[-2] % 2))
    row = torch.tensor([1.0, 0.0, -1.0], device=grey.device).expand(3, 3) / 3
    gradient = functional.conv2d(functional.avg_pool2d(grey, 2), torch.stack([row, row.T])[:, None], padding=1)
    return gradient.square().sum(1)


def _luminance(x: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1] -> [B, 1, H, W] in 0..255, by the weights of Rec. 601."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device) if x.shape[1] == 3 else x.new_ones(x.shape[1])
    if x.shape[1] not in (1, 3):
        raise Refusal(f"luminance is defined for 1 or 3 channels, not {x.shape[1]}")
    return ((x + 1) * 127.5 * weights[:, None, None]).sum(1, keepdim=True)


def high_frequency_ratio(x: Tensor, reference: Tensor) -> Tensor:
    """Energy above half the Nyquist frequency (radially) over the reference's: below 1 is blur, above 1 noise.

    nan or inf where the reference has none. Seen through a Hann window: otherwise the jump between opposite edges would
    count as detail of both pictures and hide the loss.
    """
    x, reference = _pair(x, reference)
    return _high_energy(x) / _high_energy(reference)


def _high_energy(x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    rows, columns = (torch.hann_window(n + 2, periodic=False, device=x.device)[1:-1] for n in (h, w))
    fy, fx = torch.fft.fftfreq(h, device=x.device)[:, None], torch.fft.rfftfreq(w, device=x.device)
    copies = torch.where((fx == 0) | (fx == 0.5), 1.0, 2.0)     # the half spectrum stands for the other half too
    spectrum = torch.fft.rfft2((x - x.mean((2, 3), keepdim=True)) * rows[:, None] * columns).abs().square()
    return (spectrum * copies * (fx**2 + fy**2 > 0.25**2)).sum((1, 2, 3))


def _pair(x: Tensor, y: Tensor, smallest: int = 1) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape or x.ndim != 4:
        raise Refusal(f"pictures to compare must both be [B, C, H, W]: these are {list(x.shape)} and {list(y.shape)}")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise Refusal(f"pictures to compare must be floats in [-1, 1]: these are {x.dtype} and {y.dtype}")
    if min(x.shape) < 1 or min(x.shape[-2:]) < smallest:
        raise Refusal(
            f"pictures of {x.shape[-2]} x {x.shape[-1]} pixels are too small for this measure: give {smallest} or more"
        )
    return x.float(), y.float()
