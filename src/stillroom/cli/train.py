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
from stillroom.settings.limits import Place, places_of


def run(word: str, arguments: list[str]) -> int:
    names = [e.name for e in listing() if e.verb == word]
    if not arguments or arguments[0] in ("-h", "--help"):
        preset = " | --preset NAME" if any(map(presets_of, names)) else ""
        print(f"usage: stillroom {word} RECIPE [--config FILE{preset}] [--plan] [--quiet] [SETTINGS]\n")
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
    if (preset := take_value(rest, "--preset")) is not None:
        if config is not None:
            raise Refusal("--preset and --config are both settings files: give one, and flags over it")
        config = str(preset_file(name, preset))
        name = read_toml(Path(config)).get("recipe", name)      # a codec of another kind has a recipe of its own
    recipe, name = find(name), anchored_name(name)
    if config is not None:
        check_recipe(Path(config), name)
    command = f"stillroom {word} {name}"
    presets = f"--preset {' | '.join(presets_of(name))}, " if presets_of(name) else ""
    also = f"Also: --config FILE.toml, {presets}--plan (cost only), --quiet."
    description = f"{inspect.cleandoc(doc_of(recipe))}\n\n{also}"
    file = None if config is None else Path(config)
    if "data" not in {f.name for f in dataclasses.fields(recipe.Settings)}:
        rest = without_none(rest)
    settings = parse(recipe.Settings, rest, command, description, file, also=("recipe",))
    settings = anchored(settings)
    return print_plan(recipe, settings, quiet) if plan else start(recipe, settings, name, quiet)


def without_none(arguments: list[str]) -> list[str]:
    """Without `--data none`, which says of a recipe that takes no data what is so: one line serves all recipes."""
    for i, argument in enumerate(arguments):
        if argument == "--data=none":
            return arguments[:i] + arguments[i + 1 :]
        if [argument, *arguments[i + 1 : i + 2]] == ["--data", "none"]:
            return arguments[:i] + arguments[i + 2 :]
    return arguments


def presets_of(recipe: str) -> dict[str, Path]:
    """Settings files that come with a recipe, by name."""
    files = sorted((Path(recipes.__file__).parent / "presets").glob("*.toml"))
    return {p.stem.partition(".")[2]: p for p in files if p.name.partition(".")[0] == recipe}


def preset_file(recipe: str, preset: str) -> Path:
    if not (known := presets_of(recipe)):
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


def check_recipe(config: Path, name: str) -> None:
    """A run's own settings.toml is a settings file too, but of its own recipe only."""
    written = read_toml(config).get("recipe", name)
    if written != name:
        verb = next((e.verb for e in listing() if e.name == written), "distill")
        raise Refusal(f"{config}: settings of the recipe {written}, not of {name}; use stillroom {verb} {written}")


def anchored(settings: Run) -> Run:
    """Paths become absolute, so that the run can be resumed from any folder; all but that of the run itself."""
    places, changed = places_of(type(settings)), {}
    for field in dataclasses.fields(settings):
        value, mark = getattr(settings, field.name), places.get(field.name)
        if isinstance(value, Path):
            place = expanded(value)
            changed[field.name] = place if field.name == "out" else place.absolute()    # runs may be moved
        if isinstance(value, str) and value and (mark or os.sep in value):
            changed[field.name] = anchored_place(value, mark or Place())
    return dataclasses.replace(settings, **changed)


def anchored_place(text: str, place: Place) -> str:
    """The whole path of a file or folder, alone, in a mixture, or before `:train` and the like. Other names stay."""
    from stillroom.data.mixed import mixed_name, mixture
    from stillroom.data.open import BUILTIN, LOADED, is_known, parted

    def whole(spec: str) -> str:
        if spec.startswith(LOADED):
            return LOADED + whole(spec.removeprefix(LOADED))
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
        for stage, seconds in plan.stages:
            print(f"{'stage ' + stage.name:<22} {stage.steps} steps of {1e3 * seconds:.1f} ms")
        if plan.begins:
            print(f"{'not counted':<22} what is done as a stage begins: {', '.join(plan.begins)}")
        print(f"{'whole run':<22} {plan.steps} steps, {plan.total_seconds / 60:.1f} minutes")
    return 0
