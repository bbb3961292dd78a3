"""What the README and the site show runs, and their numbers are the measured ones."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import torch
from support.launch import ROOT

PAGES = [
    "README.md",
    *(
        f"docs/pages/{name}.md"
        for name in (
            "index",
            "which-optimizer",
            "use",
            "training-loops",
            "troubleshooting",
            "directions",
            "cost",
            "diagnostics",
        )
    ),
]


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run_in_order(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert snippets
    torch.manual_seed(0)
    namespace = {"__name__": page}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"{page}[{number}]", "exec"), namespace)
    optimizer = namespace["optimizer"]
    assert optimizer.last_step is not None
    assert not optimizer.last_step.skipped


@pytest.fixture
def _pages_scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")


@pytest.mark.usefixtures("_pages_scripts")
def test_the_readme_shows_the_measured_tables():
    from readme import BLOCK, render

    text = (ROOT / "README.md").read_text()
    assert BLOCK.findall(text)
    assert render(text) == text, "run make readme"


@pytest.mark.usefixtures("_pages_scripts")
def test_the_package_index_gets_absolute_links():
    from links import LINK, absolute

    text = (ROOT / "README.md").read_text()
    where = "https://example.org/owner/name"
    known = absolute(text, where, "v1")
    assert f"![Test error, training loss and learning rate over time]({where}/raw/v1/docs/" in known
    assert f"[The documentation]({where}/blob/v1/docs/pages/index.md)" in known
    for made in (known, absolute(text, None, "v1")):
        assert not LINK.search(made)
    assert "](docs/" not in absolute(text, None, "v1")
    targets = [match["target"].partition("#")[0] for match in LINK.finditer(text)]
    assert len(targets) > 10
    for target in targets:
        assert (ROOT / target).exists(), target
    code = "```python\nx = [a](b)\n```"
    assert absolute(code, where, "v1") == code


def pages_in_order():
    """What the site's menu names."""
    return re.findall(r"^ +- .*?: (\S+\.md)$", (ROOT / "docs/mkdocs.yml").read_text(), re.MULTILINE)


def test_the_start_page_lists_every_page():
    index = (ROOT / "docs/pages/index.md").read_text()
    theory = "../../examples/pl_theory/results/thesis/"
    linked = {
        target.replace(theory, "theory/") for target in re.findall(r"\]\(([^)#]+\.md)", index)
    }
    assert set(pages_in_order()) == linked | {"index.md"}
    there = {p.relative_to(ROOT / "docs/pages").as_posix() for p in ROOT.glob("docs/pages/**/*.md")}
    there = {page for page in there if not page.startswith("assets/")}
    assert there == {page for page in linked if not page.startswith("theory/")} | {"index.md"}


def test_the_site_loads_nothing_from_elsewhere():
    parts = [ROOT / "docs/mkdocs.yml", *ROOT.glob("docs/pages/stylesheets/*")]
    assert len(parts) == 2
    for part in parts:
        assert not re.search(r"https?://", part.read_text()), part


@pytest.mark.parametrize("page", ["tuning.md", "index.md"])
def test_a_page_of_results_begins_with_what_they_come_to(page):
    text = (ROOT / "docs/pages" / page).read_text()
    verdict = '--8<-- "benchmarks/results/suite/full/tables.md:verdict"'
    assert verdict in text.split("\n![")[0].split("\n#")[0]


@pytest.mark.usefixtures("_pages_scripts")
def test_formulas_are_drawn_when_the_site_is_built():
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    from formulas import on_page_content

    class Page:
        file = type("File", (), {"src_path": "page.md"})

    inline = '<p><span class="arithmatex">\\(a &lt; \\log b\\)</span></p>'
    block = '<div class="arithmatex">\\[\n\\eta_k\n\\]</div>'
    made = on_page_content(inline + block, Page())
    assert made.count("<math") == 2
    assert made.count('display="block"') == 1
    assert "arithmatex" not in made
    with pytest.raises(Exception, match=r"page\.md.*unheard"):
        on_page_content('<span class="arithmatex">\\(\\unheard\\)</span>', Page())


@pytest.mark.usefixtures("_pages_scripts")
def test_the_matrix_of_integrations_is_that_of_the_committed_runs():
    from matrix import DATA, PAGE, render

    rows = json.loads(DATA.read_text())
    assert rows
    assert all(row["passed"] and not row["failed"] for row in rows.values())
    text = PAGE.read_text()
    assert render(text, rows) == text, "run make matrix"
    assert render(render(text, {}), rows) == text


def test_the_examples_are_all_listed_with_commands_that_exist():
    listed = set(re.findall(r"-m (examples\.[\w.]+)", (ROOT / "examples/README.md").read_text()))
    runnable = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in (ROOT / "examples").rglob("*.py")
        if path.name == "__main__.py" or '__name__ == "__main__"' in path.read_text()
    }
    assert listed == runnable


@pytest.mark.long
def test_the_demo_runs_and_redraws(tmp_path):
    command = [sys.executable, "-m", "examples.digits", "--out", str(tmp_path)]
    subprocess.run([*command, "--epochs", "1", "--seeds", "1"], cwd=ROOT, check=True)
    table = (tmp_path / "table.md").read_text()
    assert "**Adler**, untuned" in table
    assert "best of ten" in table
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    subprocess.run([*command, "--redraw"], cwd=ROOT, check=True)
    assert (tmp_path / "table.md").read_text() == table


def test_the_committed_digits_table_is_that_of_the_committed_results():
    from examples.digits.__main__ import table

    folder = ROOT / "docs/pages/assets/digits"
    assert (
        table(json.loads((folder / "results.json").read_text()))
        == (folder / "table.md").read_text()
    )


@pytest.mark.parametrize(
    "name",
    [
        "step_cost",
        "step_cost-cuda",
        "memory",
        "memory-cuda",
        "scaling",
        "tangent_kernel",
        "check_cost",
    ],
)
def test_the_committed_benchmarks_are_those_of_the_committed_results(name):
    table = importlib.import_module(f"benchmarks.{name.removesuffix('-cuda')}").table
    folder = ROOT / "benchmarks/results"
    results = json.loads((folder / f"{name}.json").read_text())
    assert table(results) == (folder / f"{name}.md").read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", ["step_cost", "memory", "scaling"])
def test_the_benchmarks_of_cost_run(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(tmp_path)]
    peers = ["--no-peers"] * (name != "scaling")  # they are not installed with the tests
    subprocess.run([*command, *peers], cwd=ROOT, check=True)
    results = json.loads((tmp_path / f"{name}.json").read_text())
    text = (tmp_path / f"{name}.md").read_text()
    assert importlib.import_module(f"benchmarks.{name}").table(results) == text
    assert "| `low_cost` |" in text
    assert "fails" not in text
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.long
def test_the_cost_of_the_checks_runs_and_keeps_what_is_there(tmp_path):
    command = [sys.executable, "-m", "benchmarks.check_cost", "--quick", "--out", str(tmp_path)]
    for network in ("MLP", "GPT"):
        subprocess.run([*command, "--networks", network], cwd=ROOT, check=True)
    results = json.loads((tmp_path / "check_cost.json").read_text())
    assert list(results["shares"]) == ["MLP, small", "GPT-style decoder, 0.8 M"]
    assert (
        importlib.import_module("benchmarks.check_cost").table(results)
        == (tmp_path / "check_cost.md").read_text()
    )


def test_what_is_timed_as_a_finite_difference_stays_one():
    """The forward engine would take over, with a warning, on a batch that is learnt by heart."""
    from benchmarks.networks import QUICK
    from benchmarks.step_cost import measure
    from benchmarks.steppers import OURS

    steppers = {name: OURS[name] for name in ("SGD", "finite_difference")}
    times, failures = measure(QUICK["MLP, small"], steppers, 100)
    assert not failures
    assert [len(found) for found in times.values()] == [100, 100]


def test_of_a_block_of_steps_the_last_measures():
    import adler
    from benchmarks import step_cost
    from benchmarks.networks import QUICK
    from benchmarks.steppers import DEFAULT

    measured = []

    def spied(model, criterion):
        optimizer = adler.AdlerScheduleFree(model.parameters(), model, criterion, measure=DEFAULT)

        def step(x, y):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            measured.append(not optimizer.last_step.curvature.isnan())

        return step

    rounds = 2 * step_cost.BLOCK
    times, _ = step_cost.measure(QUICK["MLP, small"], {"AdlerScheduleFree": spied}, rounds)
    timed = measured[-rounds:]
    assert [k for k, due in enumerate(timed) if due] == [7, 15]
    assert step_cost._LONG == 3200
    found = step_cost.at_length([1.0] * 7 + [33.0] + [2.0] * 7 + [2.0])
    assert found.tolist() == [8 * 2.0, 8 * 2.0]
    assert len(times["AdlerScheduleFree"]) == rounds


def test_the_peers_that_need_no_package_find_the_curvature():
    from benchmarks.networks import QUICK
    from benchmarks.steppers import line_search, pearlmutter

    for make in (pearlmutter, line_search):
        task = QUICK["MLP, small"]
        model, criterion = task.network(), torch.nn.CrossEntropyLoss()
        step, (x, y) = make(model, criterion), task.batch()
        before = criterion(model(x), y).item()
        for _ in range(5):
            step(x, y)
        assert criterion(model(x), y).item() < before


def test_the_committed_diagnosis_is_that_of_the_committed_snapshots():
    from examples.programs.diagnose import table

    folder = ROOT / "docs/pages/assets/diagnostics"
    results = json.loads((folder / "results.json").read_text())
    assert table(results) == (folder / "table.md").read_text()


@pytest.mark.long
def test_the_diagnosis_runs(tmp_path):
    command = [sys.executable, "-m", "examples.programs.diagnose", "--out", str(tmp_path)]
    subprocess.run([*command, "--steps", "3", "--every", "2"], cwd=ROOT, check=True)
    assert "| tangent kernel λ_max |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "report.png").stat().st_size > 20_000
