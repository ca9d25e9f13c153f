"""The docs are true: their commands run, their examples run, their tables are what the house holds."""

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from stillroom.cli.flags import flags_of
from stillroom.cli.main import main
from stillroom.cli.recipes import in_words, verdicts
from stillroom.judge.asked import OfRuns
from stillroom.recipes import listing

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run_commands(block: str) -> None:
    for line in block.strip().splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "stillroom"
        try:
            assert main(words[1:]) == 0, line
        except SystemExit as left:  # --help
            assert not left.code, line


def test_the_readmes_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(README, "bash")
    run_commands(block)
    assert (tmp_path / "teacher.png").stat().st_size > 1000
    assert (tmp_path / "runs/vsd/report.html").exists()


def test_the_readmes_python_runs_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(README, "python")
    names: dict = {}
    exec(block, names)
    assert set(names["weights"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    before = {p: p.stat().st_mtime_ns for p in Path("runs/auto").rglob("*")}
    exec(block, names)
    assert {p: p.stat().st_mtime_ns for p in Path("runs/auto").rglob("*")} == before    # nothing is trained again


def test_the_own_recipe_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/own-recipe.md").read_text()
    (code,), (commands,) = blocks(text, "python"), blocks(text, "bash")
    (tmp_path / "mine.py").write_text(code)
    run_commands(commands)
    assert (tmp_path / "herd.png").exists()


def commands(text: str) -> list[str]:
    """Of blocks, line by line, and of lines of text, between backticks."""
    fenced, inline = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL), re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line.partition(" #")[0] for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    whole = [*lines, *(" ".join(found.split()) for found in re.findall(r"`([^`]+)`", inline))]
    return [part.strip() for line in whole for part in line.split("&&") if part.strip().startswith("stillroom ")]


@cache
def known(*words: str) -> set[str]:
    """The flags that the help of a command names, and those that every one takes."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    more = {name for name, _ in flags_of(OfRuns)} if words == ("compare",) else set()
    return {f"--{name}" for name in more} | set(re.findall(r"--[a-z](?:[\w.-]*\w)?", said.getvalue())) | {"--help"}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))], ids=lambda p: p.name)
def test_the_flags_of_the_pages_commands_are_those_of_their_help(page):
    for line in commands(page.read_text()):
        _, command, *rest = re.sub(r"[][|]", " ", line).split()
        words = [command]
        if command in ("train", "distill"):
            if ".py" in rest[0]:
                continue
            words += rest[:1]
        preset = re.search(r"--preset (\w+)", line) if words[1:] == ["codec"] else None
        flags = known(*words, "--preset", preset[1]) | {"--preset"} if preset else known(*words)
        assert set(re.findall(r"(?<!\S)--[a-z][\w.-]*", " ".join(rest))) <= flags, line


def test_the_readmes_table_is_the_listing_with_its_verdicts():
    said = verdicts()
    table = re.findall(r"^\| `(\w+) ([\w-]+)` \| .* \| .*?([\d.]+)\]\(.*\) \| (.*?) ?\|$", README, re.MULTILINE)
    papers = {e.name: re.findall(r"\d{4}\.\d{4,5}", e.paper) for e in listing()}
    assert sorted((verb, name) for verb, name, *_ in table) == sorted((e.verb, e.name) for e in listing())
    for _, name, paper, claim in table:
        assert paper in papers[name]
        assert re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", claim.strip()) == in_words(name, said.get(name, {}))


@pytest.mark.parametrize("entry", listing(), ids=lambda e: e.name)
def test_each_recipe_has_its_page(entry):
    page = (ROOT / f"docs/recipes/{entry.name}.md").read_text()
    for heading in ("Problem", "Equation", "Settings", "Measured", "Not measured"):
        assert f"## {heading}" in page, heading


def test_no_page_stands_for_a_recipe_that_is_not_there():
    pages = {p.stem for p in (ROOT / "docs/recipes").glob("*.md")}
    assert pages == {e.name for e in listing()}


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md")],
                         ids=lambda p: p.name)
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_pages_name_no_place_of_the_machine_they_were_written_on():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")]:
        assert not re.search(r"(?<![\w.])/(home|work|root|tmp|Users)/", page.read_text()), page
