"""Every way in to the settings is strict, and what is written back is what was meant."""

import dataclasses
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from stillroom.cli.flags import flags_of, parse
from stillroom.cli.sample import Settings as Sample
from stillroom.judge.asked import OfCodecs
from stillroom.recipes.flow import Settings as Flow
from stillroom.recipes.sds import Settings as SDS
from stillroom.recipes.vsd import Settings as VSD
from stillroom.settings import (
    Count,
    Images,
    Natural,
    Optimizer,
    Positive,
    Refusal,
    Run,
    Share,
    Within,
    checked,
    from_mapping,
    from_toml,
    required,
    to_mapping,
    to_toml,
)
from stillroom.settings.limits import hints_of

DECLARED = [Run, Images, Optimizer, Flow, SDS, VSD, Sample]
BITS = 2**63
slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
often = hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=slow)
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


def values(hint, limit=None):
    """Everything that a declared type allows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return instances(hint)
    if origin is Annotated:
        return values(arguments[0], next((a for a in arguments[1:] if isinstance(a, Within)), None))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.none() | values(next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if hint is int:
        return st.integers(-BITS if limit is None else int(limit.low), BITS - 1)
    if hint is float:
        low, high = (None, None) if limit is None else (limit.low, min(limit.high, sys.float_info.max))
        numbers = st.floats(low, high, allow_nan=False, allow_infinity=False)
        return numbers if limit is None else numbers.filter(limit.__contains__)
    return {bool: st.booleans(), str: text, Path: text.map(Path)}[hint]


def instances(cls: Any):
    return st.builds(cls, **{name: values(hint) for name, hint in hints_of(cls).items()})


def fits(hint: Any, value) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return type(value) is hint and all(fits(h, getattr(value, n)) for n, h in hints_of(type(value)).items())
    if origin is Annotated:
        return fits(arguments[0], value) and all(value in a for a in arguments[1:] if isinstance(a, Within))
    if origin is Literal:
        return value in arguments and isinstance(value, str)
    if origin in (typing.Union, types.UnionType):
        return any(value is None if a is type(None) else value is not None and fits(a, value) for a in arguments)
    if origin is tuple:
        return type(value) is tuple and len(value) == len(arguments) and all(map(fits, arguments, value))
    finite = hint is not float or abs(value) < float("inf")
    return isinstance(value, hint) and (hint is bool) == isinstance(value, bool) and finite


def needed(cls):
    least = {"out": "o", "steps": 3, "data": "digits", "size": 8, "teacher": "ring:3", "lr": 0.1}
    return {name: least[name] for name in required(cls)}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([2**63, 10**400, -1, 0, 1])
    | st.floats() | st.text(max_size=8) | st.dates() | st.sampled_from(["", "\0", "\udcff", "a\nb", "adam", "auto"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["lr", "name", "x", "\n"]), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("cls", DECLARED)
def test_any_valid_settings_survive_a_file_exactly(cls, tmp_path):
    @often
    @given(instances(cls))
    def round_trip(settings):
        (tmp_path / "settings.toml").write_bytes(to_toml(settings).encode())
        again = from_toml(cls, tmp_path / "settings.toml")
        assert repr(again) == repr(settings)  # -0.0 too
        assert checked(settings, "here") == settings

    round_trip()


@pytest.mark.parametrize("cls", [c for c in DECLARED if c is not Optimizer])
def test_any_valid_settings_survive_the_command_line_exactly(cls):
    def flags(mapping, prefix=""):
        for key, value in mapping.items():
            flag = f"--{prefix}{key.replace('_', '-')}"
            if isinstance(value, dict):
                yield from flags(value, f"{prefix}{key.replace('_', '-')}.")
            elif isinstance(value, bool):
                yield flag if value else f"--{prefix}no-{key.replace('_', '-')}"
            elif isinstance(value, list):
                yield from [flag, *map(str, value)]
            else:
                yield f"{flag}={value}"

    @often
    @given(instances(cls))
    def round_trip(settings):
        assert repr(parse(cls, list(flags(to_mapping(settings))), "c", "")) == repr(settings)

    round_trip()


@pytest.mark.parametrize("cls", DECLARED)
def test_whatever_a_file_holds_it_becomes_settings_or_one_line(cls):
    hints, whole = hints_of(cls), needed(cls)

    @often
    @given(st.dictionaries(st.sampled_from(list(hints)), anything, min_size=1, max_size=3))
    def fuzz(wrong):
        try:
            settings = from_mapping(cls, whole | wrong, "file.toml")
        except Refusal as refusal:
            assert len(str(refusal).splitlines()) == 1
            assert str(refusal).startswith("file.toml: ")
        else:
            assert fits(cls, settings)
            assert from_mapping(cls, tomllib.loads(to_toml(settings)), "again") == settings

    fuzz()


@pytest.mark.parametrize("cls", [Flow, VSD])
def test_whatever_is_typed_it_becomes_settings_or_one_line(cls):
    words = [f"--{name}" for name, _ in flags_of(cls)]
    words += ["--no-flip", "--", "-", "--=", "-h1", "--outt", "--model", "3", "-1", "0.5", "nan", "1e999", "auto",
              "None", "[", "--size=3", "--data=digits", "--teacher=ring:3", "--out=o", "9" * 5000]

    @often
    @given(st.lists(st.sampled_from(words) | text, max_size=8))
    def fuzz(argv):
        argv = [a for a in argv if a not in ("-h", "--help")]
        try:
            settings = parse(cls, [f"--{k}={v}" for k, v in needed(cls).items()] + argv, "stillroom", "")
        except Refusal as refusal:
            assert len(str(refusal).splitlines()) == 1
        else:
            assert fits(cls, settings)

    fuzz()


@pytest.mark.parametrize("cls", DECLARED)
def test_every_misspelt_key_is_refused_with_the_name_that_was_meant(cls):
    names = list(hints_of(cls))
    for name in names:
        wrong = name[: len(name) // 2] + name[len(name) // 2 + 1 :]
        if len(name) < 5 or wrong in names:
            continue
        with pytest.raises(Refusal, match=f"here: '{wrong}' is not a setting; did you mean '{name}'"):
            from_mapping(cls, {wrong: 1}, "here")
        flag, meant = wrong.replace("_", "-"), name.replace("_", "-")
        with pytest.raises(Refusal, match=f"--{flag} is not a setting; did you mean '--{meant}"):
            parse(cls, [f"--{wrong}=1"], "c", "")


def test_a_key_like_no_other_is_refused_with_all_of_them():
    with pytest.raises(Refusal, match="'qqqq' is not a setting; known: betas, clip, decay, eps, lr, name, warmup"):
        from_mapping(Optimizer, {"qqqq": 1}, "here")


def test_a_misspelt_key_of_a_nested_table_is_refused_with_its_place():
    with pytest.raises(Refusal, match=r"f\.toml: model: 'lrr' is not a setting; did you mean 'lr'"):
        from_mapping(Flow, {"model": {"lrr": 1.0}}, "f.toml")
    with pytest.raises(Refusal, match=r"--model\.lrr is not a setting; did you mean '--model\.lr'"):
        parse(Flow, ["--model.lrr", "1"], "c", "")


def test_a_partial_table_keeps_what_the_recipe_says_of_the_others(tmp_path):
    (tmp_path / "s.toml").write_text('out = "o"\ndata = "digits"\nsize = 8\n[model]\nlr = 0.5\n')
    whole = Flow(out=Path("o"), data="digits", size=8)
    changed = dataclasses.replace(whole, model=dataclasses.replace(whole.model, lr=0.5))
    assert from_toml(Flow, tmp_path / "s.toml") == changed
    assert parse(Flow, [], "c", "", tmp_path / "s.toml") == changed
    assert changed.model.clip == 1.0 and changed.model.warmup == 100


def test_flags_lie_over_the_file_and_the_file_over_the_recipe(tmp_path):
    (tmp_path / "s.toml").write_text('data = "digits"\nsize = 8\nbatch = 7\nwidth = 32\n[model]\nlr = 0.5\nclip = 3.0')
    settings = parse(Flow, ["--out", "o", "--width", "16", "--model.lr", "0.25"], "c", "", tmp_path / "s.toml")
    assert (settings.width, settings.batch) == (16, 7)
    assert (settings.model.lr, settings.model.clip, settings.model.warmup) == (0.25, 3.0, 100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Run):
    steps: int = 10
    share: Share
    kind: Literal["a", "b"]
    student: Optimizer
    on: bool
    pair: tuple[Natural, Positive]
    maybe: Count | None = None


def test_a_list_that_is_given_twice_would_lose_its_first_half():
    """Of a single value the last one counts, as everywhere."""
    given = ["--data", "digits", "--out", "x", "--steps", "3", "--steps", "5"]
    assert parse(OfCodecs, given, "c", "").steps == 5
    assert parse(OfCodecs, [*given, "--reference", "gaussian", "noised:0.3"], "c", "").reference == (
        "gaussian", "noised:0.3")
    with pytest.raises(Refusal, match="c: --reference is given 2 times, of which the last alone would count"):
        parse(OfCodecs, [*given, "--reference", "gaussian", "--reference", "noised:0.3"], "c", "")


def test_required_settings_of_every_type_may_come_from_flags():
    argv = "--out=o --share=0.5 --kind=a --student.lr=0.1 --on True --pair 0 2".split()  # noqa: SIM905
    made = parse(Own, argv, "c", "")
    assert made == Own(out=Path("o"), share=0.5, kind="a", student=Optimizer(lr=0.1), on=True, pair=(0, 2.0))
    with pytest.raises(Refusal, match="c: --kind, --student, --on must be given"):
        parse(Own, [a for a in argv if a[2:4] not in ("ki", "st", "on")], "c", "")
    with pytest.raises(Refusal, match=r"Missing.*student\.lr"):
        parse(Own, [a.replace("lr=0.1", "name=sgd") for a in argv], "c", "")


def test_a_restated_default_keeps_the_limit_of_the_base():
    whole = {"out": "o", "share": 0.5, "kind": "a", "student": {"lr": 0.1}, "on": False, "pair": [0, 1]}
    for wrong, line in [
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"share": 1.1}, "share: 1.1 must be at least 0 and at most 1"),
        ({"pair": [0, 0]}, "pair: 0.0 must be above 0"),
        ({"pair": [-1, 1]}, "pair: -1 must be at least 0"),
        ({"maybe": 0}, "maybe: 0 must be at least 1"),
        ({"student": {"lr": 1, "betas": [0, 1]}}, "student: betas: 1.0 must be at least 0 and below 1"),
    ]:
        with pytest.raises(Refusal, match=f"^h: {line}$"):
            from_mapping(Own, whole | wrong, "h")
    made = Own(**{**whole, "out": Path("o"), "student": Optimizer(lr=-1.0), "pair": (0, 1.0)})  # pyright: ignore
    with pytest.raises(Refusal, match=r"h: student: lr: -1\.0 must be at least 0"):
        checked(made, "h")


@pytest.mark.parametrize("content", [
    b"a = ", b"\xff", b"a = 1\na = 2", b"x = " + b"9" * 5000, b"x = " + b"[" * 20000, b"size = nan",
])
def test_a_settings_file_that_cannot_be_read_is_refused_by_name(tmp_path, content):
    path = tmp_path / "s.toml"
    path.write_bytes(content)
    for read in (lambda: from_toml(Flow, path), lambda: parse(Flow, ["--out", "o"], "c", "", path)):
        with pytest.raises(Refusal) as refusal:
            read()
        assert str(refusal.value).startswith(str(path)) and len(str(refusal.value).splitlines()) == 1


def test_a_number_too_long_to_print_is_refused_too():
    for value in (10**5000, [10**5000]):
        for key in ("out", "steps", "seed", "precision", "shard"):
            with pytest.raises(Refusal, match=f"h: {key}: "):
                from_mapping(Run, {"out": "o", "steps": 1, key: value}, "h")


@pytest.mark.parametrize("place", ["nowhere.toml", "."])
def test_a_settings_file_that_is_not_there_is_refused(tmp_path, place):
    with pytest.raises(Refusal, match="settings file"):
        parse(Flow, [], "c", "", tmp_path / place)
