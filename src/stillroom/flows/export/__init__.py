"""Students of pipelines for people without stillroom: pipeline folders, and LoRA files beside a scheduler."""

from stillroom.flows.export.folder import to_pipeline

__all__ = ["to_pipeline"]
