"""The code in the documents runs, and the site that is made of them works from disk."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from helpers import skip_without_triton_on_cuda

from birnn_ext import LSTM

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GUIDE = DOCS / "migration.md"


def test_the_migration_guides_code_runs(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    assert capsys.readouterr().out == "replaced encoder\n"


def test_the_code_of_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {
        "x": torch.randn(3, 5, 28),
        "lengths": torch.tensor([5, 0, 2]),
        "reset": torch.zeros(3, 5, dtype=torch.bool),
        "model": torch.nn.Sequential(torch.nn.LSTM(28, 8)),
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_the_code_of_the_page_on_other_programs_runs():
    (block,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "elsewhere.md").read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(block.replace("28, 28)", "3, 28)"), "elsewhere.md", "exec"), {})  # torch.export unrolls the steps


def blocks_of_the_page_on_speed() -> list[str]:
    text = (DOCS / "speed.md").read_text().replace("100,", "4,")  # an emulator runs it, too
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    return blocks


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # as the page tells
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_code_of_the_page_on_speed_runs(count):
    if count == 2:
        skip_without_triton_on_cuda()
    names: dict[str, object] = {}
    for block in blocks_of_the_page_on_speed()[:count]:
        exec(compile(block, "speed.md", "exec"), names)


def test_the_code_for_cpus_of_the_page_on_speed_runs():
    exec(compile(blocks_of_the_page_on_speed()[2], "speed.md", "exec"), {"torch": torch, "LSTM": LSTM})


@pytest.mark.parametrize("page", ["elsewhere.md", "requests.md"])
def test_the_tests_that_a_page_names_exist(page):
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    named = re.findall(r"`(?:tests/)?(test_\w+)(?:\.py)?`", (DOCS / page).read_text())
    files = {file.stem for file in Path(__file__).parent.glob("test_*.py")}
    assert len(named) > 10
    assert [name for name in named if name not in files and f"def {name}(" not in tests] == []


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "DESIGN.md"])
def test_the_files_that_documents_for_contributors_name_exist(document):
    if not (ROOT / document).exists():
        pytest.skip("needs the repository's files")
    text = (ROOT / document).read_text()
    named = {
        name
        for name in re.findall(r"`([\w./-]+)`", text)
        if re.search(r"\w\.(py|pyi|h|cuh?|cpp|sh|in|toml|cff)$", name)
    }
    assert len(named) > 10
    files = [
        f"/{path.relative_to(ROOT)}"
        for folder in ("*", ".ci/*", "birnn_ext/**/*", "csrc/**/*", "tests/**/*", "tools/*")
        for path in ROOT.glob(folder)
    ]
    assert [name for name in named if not any(file.endswith(f"/{name}") for file in files)] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Returns the folder of the site that `make docs` would build."""
    if not (importlib.util.find_spec("mkdocs") and importlib.util.find_spec("mkdocstrings")):
        pytest.skip("mkdocs is not installed: pip install 'birnn_ext[docs]'")
    if not (ROOT / "mkdocs.yml").exists():
        pytest.skip("needs the repository's files")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_every_link_of_the_site_names_a_file(site):
    """A browser that reads from disk shows a folder's files, not its index.html, so no link may name a folder."""
    # a server shows 404.html, with links from its root
    pages = [page for page in site.glob("**/*.html") if page.name != "404.html"]
    assert len(pages) >= 10
    wrong = []
    for page in pages:
        links = [urlsplit(link) for link in re.findall(r'(?:href|src|action)="([^"]*)"', page.read_text())]
        assert any(link.path.endswith("site.css") for link in links)
        for link in links:
            target = page.parent / unquote(link.path) if link.path else page
            if not link.scheme and not link.netloc and not target.is_file():
                wrong.append(f"{page.name}: {link.geturl()}")
    assert not wrong


@pytest.mark.slow
def test_the_sites_search_works_from_disk(site):
    scripts = re.findall(r'<script src="(.*?)"', (site / "search.html").read_text())
    assert scripts.index("./site.js") < scripts.index("./search/main.js")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium to try it in")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    command = [browser, *options, f"--user-data-dir={site}/profile", "--virtual-time-budget=10000"]
    shown = subprocess.run(
        [*command, f"file://{site}/search.html?q=recompute"], capture_output=True, text=True, timeout=300
    ).stdout
    assert re.search(r'<article><h3><a href="\./api\.html#birnn_ext\.LSTM">LSTM</a>', shown)
