"""The README and the docs say what is so: their Python examples run, their figures are those of committed results."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pkgutil
import re
import statistics
from itertools import chain
from pathlib import Path

import pytest

from benchmarks import claim_report

ROOT = Path(__file__).parents[1]
ALL_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in ALL_PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_run(page, tmp_path, monkeypatch):
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks:
        try:
            exec(compile(block, page.name, "exec"), namespace)
        except Exception as error:
            pytest.fail(f"{error!r} in the example:\n{block}")


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_no_block_of_code_is_wider_than_its_column(page):
    # In characters: what the site's column holds, which is less than GitHub's.
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fences if language != "math"]
    indented = re.findall(r"^    (.*)$", page.read_text(), flags=re.MULTILINE)
    lines = [*indented, *chain.from_iterable(block.splitlines() for block in blocks)]
    assert not [line for line in lines if len(line) > 92]


def test_the_readmes_speeds_are_those_of_the_committed_measurements():
    text = " ".join((ROOT / "README.md").read_text().split())
    (attention,) = (ROOT / "benchmarks" / "results").glob("cpu_*.json")
    (masks,) = (ROOT / "benchmarks" / "results").glob("masks_*.json")
    flash: dict[bool, list[float]] = {True: [], False: []}
    for row in json.loads(attention.read_text())["results"]:
        ms = {name: times["forward+backward"] for name, times in row["ms"].items()}
        if row["dtype"] == "float32":
            flash[row["case"].startswith("1x")].append(ms["SDPA flash, no bias"] / ms["atman"])
    steps: dict[str, list[float]] = {}
    for result in json.loads(masks.read_text())["results"]:
        if result["peer"] in result["arms"]:
            seconds = {name: arm["seconds"] for name, arm in result["arms"].items()}
            steps.setdefault(result["peer"], []).append(seconds[result["peer"]] / seconds["fast"])
    shown = re.findall(r"([\d.]+)(?: to ([\d.]+))? times", text.split("## Speed")[1].split("## ")[0])
    measured = [flash[True], flash[False], steps["paper"], steps["sdpa-by-8"]]
    ends = [end for ratios in measured for end in (min(ratios), max(ratios))]
    # Only the slower of the two batches of short sequences is named.
    del ends[3]
    numbers = [number for pair in shown for number in pair if number]
    for number, value in zip(numbers, ends, strict=True):
        assert float(number) == pytest.approx(value, abs=0.501 * 10 ** -len(number.partition(".")[2]))


def test_the_tables_of_the_three_rewards_are_those_of_the_committed_runs():
    path, content = claim_report.latest()
    for page, text in claim_report.pages(path, content).items():
        assert page.read_text() == text, f"run python -m benchmarks.claim_report to renew {page.name}"


@pytest.mark.parametrize("runs", [3, 8, 20])
def test_an_interval_over_seeds_holds_95_percent_of_students_distribution(runs):
    freedom = runs - 1
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    values = [float(run) for run in range(runs)]
    mean, low, high = claim_report.interval(values)
    assert low + high == pytest.approx(2 * mean)
    quantile = (high - mean) * math.sqrt(runs) / statistics.stdev(values)
    width = quantile / 10_000
    points = ((step + 0.5) * width for step in range(10_000))
    inside = 2 * width * sum(scale * (1 + t * t / freedom) ** (-runs / 2) for t in points)
    assert inside == pytest.approx(0.95, abs=1e-5)


def test_every_promise_of_reliability_names_a_test_that_exists():
    rows = re.findall(
        r"^\| (?!event |input )(.+) \|$", (ROOT / "docs" / "reliability.md").read_text(), flags=re.MULTILINE
    )
    assert len(rows) > 20
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for row in rows:
        named = re.fullmatch(r"`(test_\w+\.py) -k (\w+)`", row.rsplit(" | ", 1)[1])
        assert named, row
        tests = [
            name for name in re.findall(r"^def (test_\w+)", files[named[1]], flags=re.MULTILINE) if named[2] in name
        ]
        assert tests, row


def test_every_file_that_the_architecture_sends_to_exists():
    rows = re.findall(r"^\| (?!to change)(.+) \|$", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        folder = ROOT
        # A name without a folder lies beside the one named before it.
        for name in re.findall(r"`([\w/*]+(?:/|\.(?:py|h)))`", row.rsplit(" | ", 1)[1]):
            path = ROOT / name if "/" in name else folder / name
            assert list(path.parent.glob(path.name)), f"{name} in the row {row!r}"
            folder = path if path.is_dir() else path.parent


DOCUMENTED = [
    path
    for page in (ROOT / "docs").glob("api*.md")
    for path in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)
]


@pytest.mark.parametrize(
    "package",
    [
        "atman_kernels",
        "atman_kernels.hf",
        "atmanrl",
        "atmanrl.saliency",
        "atmanrl.report",
    ],
)
def test_every_public_class_and_function_stands_on_an_api_page(package):
    documented = list(map(pkgutil.resolve_name, DOCUMENTED))
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    callables = {name: each for name, each in public.items() if callable(each)}
    assert [name for name, each in callables.items() if not any(each is known for known in documented)] == []


@pytest.mark.parametrize("path", DOCUMENTED)
def test_a_docstring_of_the_api_page_describes_every_parameter_and_no_other(path):
    found = pkgutil.resolve_name(path)
    text = inspect.getdoc(found)
    assert text
    if inspect.ismodule(found):
        return
    section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)*)", text, flags=re.MULTILINE)
    lines = re.findall(r"^    (\w[\w, ]*):(?: |$)", section[1], flags=re.MULTILINE) if section else []
    described = {name.strip() for line in lines for name in line.split(",")}
    signature = inspect.signature(found).parameters.values()
    parameters = {each.name for each in signature if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    known: set[str] = set()
    if inspect.isclass(found):
        # What a base of another package takes is described there.
        parameters -= {name for base in inspect.getmro(found)[1:] for name in vars(base).get("__annotations__", ())}
        known = {*inspect.get_annotations(found), *vars(found)}
    assert described <= parameters | known, "describes what it does not have"
    assert parameters <= described, f"does not describe {sorted(parameters - described)}"
