"""Distils generative models."""
