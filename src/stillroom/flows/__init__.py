"""Denoisers, guidance, samplers, and flows that can be drawn from."""

from stillroom.flows.closed import Gaussian, Mixture, Shaped
from stillroom.flows.denoiser import AutoGuided, Bare, Denoiser, Denoises, During, Guided, Split, Told, guided
from stillroom.flows.fewstep import FewStep, Gradient, Move, Routed, rollout, step
from stillroom.flows.flow import Flow, noise_of
from stillroom.flows.folders import DiffusersNet, from_diffusers
from stillroom.flows.gate import Verdict, check, require
from stillroom.flows.generator import Generator, drawn_at_once
from stillroom.flows.onestep import OneStep, extrapolated, require_sight, student_of
from stillroom.flows.references import ClosedFlow, Noised, Spec, open_reference, parse_reference, require_fit
from stillroom.flows.regression import denoising_loss
from stillroom.flows.samplers import ddim, dpmpp_2m, euler, heun, latest, samplers
from stillroom.flows.tally import Tally

__all__ = [
    "AutoGuided", "Bare", "ClosedFlow", "Denoiser", "Denoises", "DiffusersNet", "During", "FewStep", "Flow", "Gaussian",
    "Generator", "Gradient", "Guided", "Mixture", "Move", "Noised", "OneStep", "Routed", "Shaped", "Spec", "Split",
    "Tally", "Told", "Verdict", "check", "ddim", "denoising_loss", "dpmpp_2m", "drawn_at_once", "euler", "extrapolated",
    "from_diffusers", "guided", "heun", "latest", "noise_of", "open_reference", "parse_reference", "require",
    "require_fit", "require_sight", "rollout", "samplers", "step", "student_of",
]
