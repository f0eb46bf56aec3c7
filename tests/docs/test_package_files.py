"""README, CHANGELOG and pyproject.toml agree with the package."""

import pathlib
import re
import tomllib

import pytest

import goose_jax
import pallas_kernels

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize(
    ("number", "printed"),
    [
        (0, r"\(2, 128, 4, 64\) \(2, 4, 64, 64\)"),
        (1, r"\(2, 16, 128\)"),
        (2, r"0 [\d.]+\n1 [\d.]+\n2 [\d.]+\n\[\[[\d, ]+\]\]"),
    ],
)
def test_quick_starts_run_alone(number, printed, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    exec(compile(blocks[number], "README.md", "exec"), {"__name__": "readme"})
    assert re.fullmatch(printed, capsys.readouterr().out.strip())


def test_both_packages_have_the_version_of_the_changelog():
    assert goose_jax.__version__ == pallas_kernels.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", pallas_kernels.__version__]


def test_tests_run_on_the_releases_of_jax_that_the_extra_cuda_admits():
    extras = PROJECT["optional-dependencies"]
    (cuda,) = extras["cuda"]
    (tests,) = [requirement for requirement in extras["test"] if requirement.startswith("jax>")]
    oldest, _ = bounds = cuda.removeprefix("jax[cuda13]").split(",")
    assert tests.removeprefix("jax").split(",") == bounds
    assert f"jax{oldest}" in PROJECT["dependencies"]
    assert f"JAX from {oldest.removeprefix('>=')} to " in README


def test_the_workflow_runs_the_oldest_and_the_newest_jax():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    oldest, newest = re.findall(r'jax: "([\d.]+)"', workflow)
    (cuda,) = PROJECT["optional-dependencies"]["cuda"]
    assert f">={oldest},<" in cuda
    assert f"JAX from {oldest} to {newest} on GPUs" in README
    pythons = re.findall(r'{python: "([\d.]+)"', workflow)
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    known = [name for name in PROJECT["classifiers"] if " :: 3." in name]
    assert known[0].endswith(pythons[0])
    assert known[-1].endswith(pythons[-1])


def test_citation_has_the_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {goose_jax.__version__}\n" in citation


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    folders = ("goose_jax", "pallas_kernels", "tests", "benchmarks", "examples", "website")
    files = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for name in re.findall(r"[\w/]+\.py\b", text):
        assert any(f"/{path}".endswith(f"/{name}") for path in files), name
