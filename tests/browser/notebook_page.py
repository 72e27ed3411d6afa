"""JupyterLab as the course ships it, and a notebook in it as a person uses it: by eye and keyboard.

Nothing here sleeps or counts on speed: whatever takes time is waited for until it is visible, at most WAIT long.
"""

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, Locator, Page, Playwright, Route, expect

from minillama4.course import lab

WAIT = 120  # seconds, for a machine that is busy with something else; nothing takes that long on an idle one
TOKEN = "of-the-tests"
FLAGS = """--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
           --disable-sync --disable-dev-shm-usage""".split()


@contextmanager
def serve(work: Path, own: Path) -> Iterator[str]:
    """The address of JupyterLab, started for `work` as `make lab` starts it; `own` takes its folders and its log.

    The user's own settings are left out: a test of the shipped ones must not depend on them.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    names = [f"JUPYTER_{kind}_DIR" for kind in ("CONFIG", "DATA", "RUNTIME")]
    names += ["JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR"]
    environ |= {name: str(own / name.lower()) for name in names} | {"JUPYTER_TOKEN": TOKEN}
    options = ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--no-browser"]
    options += ["--LabApp.expose_app_in_browser=True"]  # `jupyterapp` in the page, which says when the kernel is ready
    command, environ = lab.jupyter(work, environ, options)
    with (own / "jupyterlab.log").open("w") as log:
        server = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait_until_up(f"http://127.0.0.1:{port}", server, own / "jupyterlab.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # it ends its kernels first
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait_until_up(address: str, server: subprocess.Popen, log: Path):
    deadline = time.monotonic() + WAIT
    while True:
        try:
            with urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=30):
                return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, (
                f"JupyterLab did not start:\n{log.read_text()}"
            )
            time.sleep(0.1)


@contextmanager
def browse(playwright: Playwright, chromium: str, address: str, profile: Path) -> Iterator[BrowserContext]:
    """A browser with a fresh profile that reaches only `address`; `context.refused` lists what it wanted beside."""
    context = playwright.chromium.launch_persistent_context(
        profile,
        executable_path=chromium,
        headless=True,
        args=[*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else FLAGS,  # as root, Chromium starts only without it
        viewport={"width": 1280, "height": 900},
        service_workers="block",  # their requests would go round the filter
    )
    context.set_default_timeout(1000 * WAIT)
    expect.set_options(timeout=1000 * WAIT)
    context.refused = []

    def only_here(route: Route):
        url = urlsplit(route.request.url)
        if url.scheme in ("data", "blob") or f"{url.scheme}://{url.netloc}" == address:
            route.continue_()
        else:
            context.refused.append(route.request.url)
            route.abort()

    context.route("**/*", only_here)
    try:
        yield context
    finally:
        context.close()


# The kernel's indicator says "idle" before the kernel is connected; a Run All sent then is lost without a word.
IS_CONNECTED = """() => {
    const context = window.jupyterapp?.shell.currentWidget?.context;
    const kernel = context?.sessionContext?.session?.kernel;
    return Boolean(context?.isReady && context.sessionContext.isReady && kernel?.connectionStatus === "connected"
        && kernel.status === "idle");
}"""
# Stored counts and outputs go first, so that what is there afterwards comes from this run.
RUN_ALL = """async () => {
    const {commands} = window.jupyterapp;
    await commands.execute("notebook:clear-all-cell-outputs");
    window.allRan = undefined;
    commands.execute("notebook:run-all-cells").then(ok => { window.allRan = ok; }, () => { window.allRan = false; });
}"""
CODE_CELLS = """() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells
    .filter(cell => cell.cell_type === "code" && [cell.source].flat().join("").trim())"""
FOCUSED = """() => {
    const at = document.activeElement, labelled = at.closest(".widget-inline-hbox");
    return labelled?.querySelector(".widget-label")?.textContent || at.textContent.trim();
}"""


class Notebook:
    """A notebook in a tab of its own, with a kernel of its own."""

    def __init__(self, context: BrowserContext, address: str, path: str):
        self.page, self.address, self.path, self.errors = context.new_page(), address, path, []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self):
        self.page.goto(f"{self.address}/lab/tree/{self.path}?token={TOKEN}&reset")
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        self.page.wait_for_function(IS_CONNECTED)

    def run_all(self):
        """AssertionError: a cell did not run, or shows an error and is not tagged as one that raises it."""
        self.page.evaluate(RUN_ALL)
        self.page.wait_for_function("() => window.allRan !== undefined")
        for number, cell in enumerate(self.page.evaluate(CODE_CELLS), start=1):
            failed = [output for output in cell["outputs"] if output["output_type"] == "error"]
            expected = "raises-exception" in cell["metadata"].get("tags", ())
            assert expected or not failed, f"code cell {number}: {failed[0]['ename']}: {failed[0]['evalue']}"
            assert cell["execution_count"], f"code cell {number} did not run"
        assert self.page.evaluate("() => window.allRan") is True
        assert not self.errors, f"errors in the page: {self.errors}"

    def number_of_cells(self) -> int:
        return self.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.widgets.length")

    def widget(self, *labels: str) -> "Widget":
        """The one widget that has controls with these labels, be they beside a control or on a button."""
        found = self.page.locator(".jp-OutputArea-output")
        for label in labels:
            control = f".widget-label:text-is('{label}'), .widget-button:text-is('{label}')"
            found = found.filter(has=self.page.locator(control))
        found.scroll_into_view_if_needed()
        return Widget(self.page, found)

    def screenshot(self, file: Path):
        self.page.screenshot(path=file)

    def close(self):
        self.page.evaluate("() => window.jupyterapp?.shell.currentWidget?.context.sessionContext.shutdown()")
        self.page.close()


class Widget:
    """Controls are found by their labels and worked by keyboard, because some people have nothing else."""

    def __init__(self, page: Page, box: Locator):
        self.page, self.box, self.keyboard = page, box, page.keyboard
        self.says, self.picture = box.get_by_role("status"), box.get_by_role("img")

    def wait_until_it_says(self, text: str | re.Pattern):
        expect(self.says).to_contain_text(text)

    def control(self, label: str) -> Locator:
        """What takes the keys: a field, a dropdown, a button, the handle of a slider."""
        slider = self.box.locator(".widget-slider", has=self.page.locator(f".widget-label:text-is('{label}')"))
        field, button = self.box.get_by_label(label, exact=True), self.box.get_by_role("button", name=label, exact=True)
        return slider.locator(".noUi-handle").or_(field).or_(button)

    def value(self, label: str) -> str:
        control = self.control(label)
        of_slider = control.get_attribute("aria-valuetext")
        return control.input_value() if of_slider is None else of_slider

    def focused(self) -> str:
        """The label of the control that has the keyboard."""
        return self.page.evaluate(FOCUSED)

    def focus(self, label: str) -> Locator:
        control = self.control(label)
        control.focus()
        return control

    def move(self, label: str, steps: int):
        """Move a slider by so many arrow keys, to the left where negative."""
        self.focus(label)
        for _ in range(abs(steps)):
            self.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")

    def choose(self, label: str, option: str):
        """Go to an option of a dropdown by arrow keys."""
        dropdown = self.focus(label)
        options = dropdown.locator("option").evaluate_all("options => options.map(option => option.value)")
        steps = options.index(option) - options.index(dropdown.input_value())
        for _ in range(abs(steps)):
            self.keyboard.press("ArrowDown" if steps > 0 else "ArrowUp")
        expect(dropdown).to_have_value(option)

    def write(self, label: str, text: str):
        """Replace what a field holds."""
        self.focus(label)
        self.keyboard.press("Control+A")
        self.keyboard.type(text)

    def press(self, label: str):
        """Push a button."""
        self.focus(label)
        self.keyboard.press("Enter")
