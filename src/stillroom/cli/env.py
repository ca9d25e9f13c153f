"""`stillroom env`: what a bug report needs."""

import importlib.metadata
import platform

from stillroom.settings import Refusal

PACKAGES = ("torch", "numpy", "diffusers", "transformers", "accelerate", "datasets", "peft", "safetensors")


def run(word: str, arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: stillroom env")
        return 0
    if arguments:
        raise Refusal("usage: stillroom env")
    import torch

    from stillroom.train.folder import machine
    from stillroom.train.world import pick_device

    facts = {"stillroom": importlib.metadata.version("stillroom"), **machine(pick_device("auto"))}
    facts["bfloat16 units"] = ", ".join(_bf16_units()) or "none seen"
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts["system"] = platform.system()
    facts["cuda"] = torch.version.cuda or "not in this torch"
    for key, value in facts.items():
        print(f"{key:<15} {value}")
    return 0


def _bf16_units() -> list[str]:
    from torch.backends import cpu

    return [cpu.get_cpu_capability()] if "AMX" in cpu.get_cpu_capability().upper() else _cpu_flags()


def _cpu_flags() -> list[str]:
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return sorted(words & {"avx512_bf16", "amx_bf16", "bf16"})
