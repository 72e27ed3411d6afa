"""A lesson in a browser: one JupyterLab and one Chromium for all of these tests, a tab for each file of them.

They are skipped where there is no browser, except under CI, which must not pass by not looking.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from minillama4.course import lab
from minillama4.course.doctor import BROWSERS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)  # the system's own; Playwright's download is not used
MISSING = ["Chromium (apt-get install chromium)"] * (not CHROMIUM)
MISSING += ["Playwright (pip install playwright)"] * (not find_spec("playwright"))
NEEDED = f"browser tests need {' and '.join(MISSING)}"


def pytest_collection_modifyitems(items):
    """They come last: from Playwright's start to its stop, whatever wants an event loop here finds one running."""
    items.sort(key=lambda item: item.path.is_relative_to(HERE))
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("browser")
            if MISSING and not os.environ.get("CI"):
                item.add_marker(pytest.mark.skip(NEEDED))


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory) -> Path:
    """MINILLAMA4_SCREENSHOTS, or a folder of pytest's, which keeps those of the last three runs."""
    folder = Path(os.environ.get("MINILLAMA4_SCREENSHOTS") or tmp_path_factory.getbasetemp() / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    """JupyterLab on a learner's fresh copy of the course, so that a test writes neither there nor in `work/`."""
    if MISSING:
        pytest.fail(NEEDED, pytrace=False)
    from notebook_page import serve

    root, own = tmp_path_factory.mktemp("course"), tmp_path_factory.mktemp("jupyter")
    for folder in lab.FOLDERS:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, root / folder)
    lab.fill(root)
    with serve(root / "work", own) as address:
        yield address


@pytest.fixture(scope="session")
def browser(address, tmp_path_factory):
    from notebook_page import browse
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        browse(playwright, CHROMIUM, address, tmp_path_factory.mktemp("profile")) as it,
    ):
        yield it


@pytest.fixture(scope="module")
def open_notebook(browser, address, screenshots):
    """`open_notebook("notebooks/00_start_here.ipynb")` -> Notebook. How it looked in the end is kept as a picture."""
    from notebook_page import Notebook

    opened = []

    def open_it(path: str) -> Notebook:
        opened.append(Notebook(browser, address, path))
        opened[-1].open()
        return opened[-1]

    yield open_it
    for notebook in opened:
        notebook.screenshot(screenshots / f"{Path(notebook.path).stem}.png")
        notebook.close()
    wrong = [error for notebook in opened for error in notebook.errors]
    wrong += [f"it asked another machine for {url}" for url in browser.refused]
    assert not wrong, f"the page, while {[notebook.path for notebook in opened]} was open: {wrong}"
