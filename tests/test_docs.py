"""The docs are true: their commands run, their examples run, their tables are what the house holds."""

import re
import shlex
from pathlib import Path

import pytest

from stillroom.cli.main import main
from stillroom.cli.recipes import in_words, verdicts
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
    exec(block, names)  # finished: nothing is trained again


def test_the_own_recipe_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/own-recipe.md").read_text()
    (code,), (commands,) = blocks(text, "python"), blocks(text, "bash")
    (tmp_path / "mine.py").write_text(code)
    run_commands(commands)
    assert (tmp_path / "herd.png").exists()


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
