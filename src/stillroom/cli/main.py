"""The table of commands, and the one place where a refusal becomes a line and an exit code."""

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": ("demo", "a tour in a few minutes, ending with a page"),
    "train": ("train", "a teacher from data: stillroom train flow --help"),
    "distill": ("train", "a student: stillroom distill vsd --help, or FILE.py:RECIPE"),
    "resume": ("resume", "go on with a run that was stopped or killed"),
    "sample": ("sample", "draw from what a run made"),
    "encode": ("codec", "pictures to latents: stillroom encode FILES... --codec CODEC"),
    "decode": ("codec", "latents to pictures"),
    "reconstruct": ("codec", "pictures through a codec and back"),
    "sweep": ("sweep", "a codec over sizes and scales: stillroom sweep RUN --data HELDOUT"),
    "cache": ("cache", "pictures to a store of latents (--codec), or prompts to their embeddings (--prompts)"),
    "inspect": ("inspect", "the geometry of a space, and whether drifting will work there"),
    "compare": ("compare", "codecs, or flows and generators, side by side: stillroom compare A B --data IMAGES"),
    "evaluate": ("evaluate", "samples against data, beside real against real"),
    "export": ("export", "codecs and students for diffusers, codecs for ComfyUI or ONNX: export RUN --to diffusers"),
    "report": ("report", "write a run's report.html anew"),
    "recipes": ("recipes", "the methods, with their papers and claims"),
    "claims": ("claims", "the evidence: list, run, docs"),
    "env": ("env", "what stillroom sees of this machine"),
}
"""word: (module of this package, help). Each module has `run(word, arguments)`."""


PLACES = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors of a place that was given, which its giver can mend."""


def usage() -> str:
    lines = [f"  {word:<11} {text}" for word, (_, text) in COMMANDS.items()]
    return "\n".join([
        "stillroom distils generative models: small codecs, latents that are easy to model, one-step generators.", "",
        "usage: stillroom COMMAND [OPTIONS]", "", *lines, "",
        "Every command has --help. Start with: stillroom demo",
    ])


def is_of_memory(error: Exception) -> bool:
    """Torch has a class of its own for an accelerator's, and none for the processor's."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or "can't allocate memory" in str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    # Before torch starts its threads: idle ones of GNU's OpenMP spin for microseconds and then sleep. Spinning on, as
    # they do by default, halves the speed of small networks, or worse, on a machine that has anything else to do.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    words = list(sys.argv[1:] if arguments is None else arguments)
    from stillroom.settings.errors import Refusal, nearest

    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(usage())
            return 0
        if words[0] in ("-V", "--version"):
            from importlib.metadata import version

            print(version("stillroom"))
            return 0
        if words[0] not in COMMANDS:
            raise Refusal(f"no command is called {words[0]!r}{nearest(words[0], COMMANDS)}")
        module = importlib.import_module(f"stillroom.cli.{COMMANDS[words[0]][0]}")
        return module.run(words[0], words[1:]) or 0
    except Refusal as refusal:
        print(f"stillroom: {refusal}", file=sys.stderr)
        return 2
    except SyntaxError as error:  # a recipe file of the user's
        print(f"stillroom: {error.filename}, line {error.lineno}: not Python: {error.msg}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stillroom: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `stillroom recipes | head`
        sys.stderr.close()
        return 0
    except (MemoryError, RuntimeError) as error:
        if not is_of_memory(error):
            raise
        print(f"stillroom: out of memory: {(str(error).splitlines() or ['no more is to be had'])[0]}; give a smaller "
              "--batch or --size, --accumulate, or a smaller network", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, or a place that may not be written or read
        where = f"{error.filename}: " if error.filename else ""
        is_place = isinstance(error, PLACES)
        print(f"stillroom: {where}{error.strerror or error}{'; give another place' * is_place}", file=sys.stderr)
        return 2 if is_place else 1
