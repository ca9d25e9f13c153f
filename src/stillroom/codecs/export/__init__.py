"""Codecs for people without stillroom: diffusers folders, TAESD weight files, ONNX graphs."""

from stillroom.codecs.export.folder import to_diffusers, to_module, to_tiny
from stillroom.codecs.export.graph import to_onnx
from stillroom.codecs.export.layout import to_taesd

__all__ = ["to_diffusers", "to_module", "to_onnx", "to_taesd", "to_tiny"]
