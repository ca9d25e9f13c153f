"""Pixels to latents and back: codecs of our own and other people's, in one form."""

from stillroom.codecs.codec import (
    Codec,
    Encodes,
    Posterior,
    Remapped,
    fingerprint,
    padded,
    require_multiple,
    require_signed,
    require_signed_as_given,
    resized,
)
from stillroom.codecs.folders import from_diffusers, require_usable
from stillroom.codecs.klt import equal_budget, fit_klt
from stillroom.codecs.taesd import from_taesd
from stillroom.codecs.tiles import Tiled

__all__ = [
    "Codec", "Encodes", "Posterior", "Remapped", "Tiled", "equal_budget", "fingerprint", "fit_klt", "from_diffusers",
    "from_taesd", "padded", "require_multiple", "require_signed", "require_signed_as_given", "require_usable",
    "resized",
]
