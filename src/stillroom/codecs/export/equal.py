"""The check that what was written is the codec."""

from collections.abc import Callable

import torch
from torch import Tensor

from stillroom.codecs.codec import Codec


@torch.no_grad()
def require_equal(codec: Codec, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor],
                  tolerance: float = 1e-5) -> None:
    """What was written answers as the codec does; the tolerance is relative to the answers' range."""
    f, random = codec.space.factor, torch.Generator().manual_seed(0)
    high, wide = getattr(codec.encoder, "places", (6, 8))
    x = torch.rand(2, 3, high * f, wide * f, generator=random) * 2 - 1
    z = codec.encode(x)
    for name, mine, theirs in (("latents", z, encode(x)), ("pictures", codec.decode(z), decode(z))):
        error = float((mine - theirs).abs().max() / (mine.max() - mine.min()).clamp(min=1e-12))
        if not error <= tolerance:
            raise RuntimeError(f"the written export's {name} differ from the codec's by {error:.2g} of their range")
