"""`stillroom train RECIPE` and `stillroom distill RECIPE`: settings in, a run folder out."""

import dataclasses
import inspect
import os
import re
from pathlib import Path

from stillroom import recipes
from stillroom.cli.flags import parse, take, take_value
from stillroom.recipes import find, listing
from stillroom.settings import Refusal, Run, expanded, nearest, read_toml
from stillroom.settings.limits import Place, hints_of


def run(word: str, arguments: list[str]) -> int:
    names = [e.name for e in listing() if e.verb == word]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: stillroom {word} RECIPE [--config FILE | --preset NAME] [--plan] [--quiet] [SETTINGS]\n")
        print("\n".join(f"  {e.name:<12} {e.title}" for e in listing() if e.verb == word))
        print(f"\nOne recipe's settings: stillroom {word} {names[0]} --help. Your own: stillroom distill FILE.py:CLASS")
        return 0
    name, rest = arguments[0], arguments[1:]
    if ":" not in name and name not in names:
        other = {e.name: e.verb for e in listing()}
        if name in other:
            raise Refusal(f"{name} is a recipe of: stillroom {other[name]} {name}")
        if name.endswith(".py"):
            raise Refusal(f"{name}: name the class in the file too: stillroom {word} {name}:CLASS")
        raise Refusal(f"no recipe of stillroom {word} is called {name!r}{nearest(name, names)}")
    plan, quiet, config = take(rest, "--plan"), take(rest, "--quiet"), take_value(rest, "--config")
    if preset := take_value(rest, "--preset"):
        if config:
            raise Refusal("--preset and --config are both settings files: give one, and flags over it")
        config = str(preset_file(name, preset))
        name = read_toml(Path(config)).get("recipe", name)      # a codec of another kind has a recipe of its own
    recipe, name = find(name), anchored_name(name)
    if config:
        check_recipe(Path(config), name, word)
    command = f"stillroom {word} {name}"
    also = "Also: --config FILE.toml, --preset NAME, --plan (cost only), --quiet."
    description = f"{inspect.cleandoc(doc_of(recipe))}\n\n{also}"
    settings = parse(recipe.Settings, rest, command, description, Path(config) if config else None, also=("recipe",))
    settings = anchored(settings)
    return print_plan(recipe, settings, quiet) if plan else start(recipe, settings, name, quiet)


def preset_file(recipe: str, preset: str) -> Path:
    """A settings file that comes with the recipe."""
    folder = Path(recipes.__file__).parent / "presets"
    known = {p.stem.partition(".")[2]: p for p in sorted(folder.glob(f"{recipe}.*.toml"))}
    if not known:
        raise Refusal(f"{recipe} has no presets")
    if preset not in known:
        raise Refusal(f"{recipe} has no preset {preset!r}{nearest(preset, known)}")
    return known[preset]


def doc_of(recipe: type) -> str:
    """The recipe's page: the docstring of its file, else of its class."""
    return inspect.getmodule(recipe).__doc__ or recipe.__doc__ or recipe.__name__  # pyright: ignore


def anchored_name(name: str) -> str:
    """FILE.py:CLASS with the whole path of the file, so that the run can be resumed from any folder."""
    file, colon, cls = name.rpartition(":")
    return f"{Path(file).resolve()}:{cls}" if colon else name


def check_recipe(config: Path, name: str, word: str) -> None:
    """A run's own settings.toml is a settings file too, but of its own recipe only."""
    written = read_toml(config).get("recipe", name)
    if written != name:
        raise Refusal(f"{config}: settings of the recipe {written}, not of {name}; use stillroom {word} {written}")


def anchored(settings: Run) -> Run:
    """Paths that exist become absolute, so that the run can be resumed from any folder."""
    hints = hints_of(type(settings))
    changed = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        place = next((m for m in getattr(hints[field.name], "__metadata__", ()) if isinstance(m, Place)), None)
        if isinstance(value, Path) and field.name != "out":     # which is where the run lies, and may be moved
            changed[field.name] = expanded(value).absolute()
        if isinstance(value, str) and value and (place or os.sep in value):
            changed[field.name] = anchored_place(value, place or Place())
    return dataclasses.replace(settings, **changed)


def anchored_place(text: str, place: Place) -> str:
    """The whole path of a file or folder, alone, in a mixture, or before `:train` and the like. Other names stay."""
    from stillroom.data.mixed import mixed_name, mixture
    from stillroom.data.open import BUILTIN, is_known, parted

    def whole(spec: str) -> str:
        for name, split in ((spec, None), parted(spec)):
            if name and name not in BUILTIN and (place := expanded(name)).exists():
                return str(place.resolve()) + (f":{split}" if split else "")
        return spec

    if text in place.names:
        return text
    if place.after and (before := re.match(place.after, text)):
        return before[0] + whole(text[before.end():])
    parts = mixture(text, is_known)
    if len(parts) == 1:
        return whole(text)
    found = [(share, whole(name)) for share, name in parts]
    return text if found == parts else mixed_name(found)


def is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def start(recipe: type, settings: Run, name: str, quiet: bool) -> int:
    from stillroom import train
    from stillroom.cli.progress import watch_for

    folder = train.start(recipe, settings, name, watch=watch_for(quiet or not is_first()))
    return finish(folder, quiet)


def finish(folder: Path, quiet: bool) -> int:
    """The report stands above the loop, so it is written here."""
    if is_first():
        from stillroom.report import write_report

        page = write_report(folder)
        if not quiet:
            print(f"product: {folder / 'product'}\nreport:  {page}")
    return 0


def print_plan(recipe: type, settings: Run, quiet: bool) -> int:
    from stillroom import train
    from stillroom.cli.progress import watch_for

    plan = train.make_plan(recipe, settings, watch=watch_for(quiet))
    if is_first():
        for role, count in plan.parameters.items():
            print(f"{role + ' trains':<22} {count:,} parameters")
        print(f"{'precision':<22} {plan.precision}")
        print(f"{'memory':<22} {plan.memory_gib:.2f} GiB at its peak")
        print(f"{'time per step':<22} {1e3 * plan.seconds_per_step:.1f} ms")
        print(f"{'whole run':<22} {plan.steps} steps, {plan.total_seconds / 60:.1f} minutes")
    return 0
