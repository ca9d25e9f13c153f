"""Pixels to latents and back: codecs of our own and other people's, in one form."""

from stillroom.codecs.codec import Codec, Encodes, Posterior, Remapped, padded, require_signed, resized

__all__ = ["Codec", "Encodes", "Posterior", "Remapped", "padded", "require_signed", "resized"]
