"""Looks at a report in Chromium, wide and narrow, and uses it by keyboard alone. A process of its own: see test_report.

python look.py CHROMIUM REPORT SCREENSHOTS
"""

import os
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
FOCUSED = "document.activeElement.textContent.trim()"


def main(chromium: str, report: str, shots: str):
    address, shots = Path(report, "index.html").resolve().as_uri(), Path(shots)
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=flags)
        for name, size in (("wide", WIDE), ("narrow", NARROW)):
            page = browser.new_page(viewport=size)
            page.set_default_timeout(120_000)
            asked, problems = [], []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("console", lambda said, problems=problems: problems.append(said.text))
            page.on("pageerror", lambda error, problems=problems: problems.append(str(error)))
            page.goto(address)
            page.screenshot(path=shots / f"report-{name}.png", full_page=True)
            fits = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert fits, f"the {name} page must be scrolled sideways"

            page.keyboard.press("Tab")
            assert page.evaluate(FOCUSED) == "To the content", "the first stop leads past what comes first"
            for _ in range(60):  # tables are stops too, since they can be scrolled
                page.keyboard.press("Tab")
                if page.evaluate("document.activeElement.getAttribute('href') || ''").startswith("learners/"):
                    break
            learner = page.evaluate(FOCUSED)
            ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert learner and ring == "solid", "what has the focus can be seen"
            page.keyboard.press("Enter")
            expect(page.get_by_role("heading", level=1)).to_have_text(learner)
            page.screenshot(path=shots / f"learner-{name}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            page.keyboard.press("Tab")
            page.keyboard.press("Tab")
            assert page.evaluate(FOCUSED) == "All grades"
            page.keyboard.press("Enter")
            expect(page.get_by_role("heading", level=1)).to_have_text("Grades")

            summary = page.locator("summary")
            if summary.count():
                summary.focus()
                page.keyboard.press("Enter")
                expect(page.locator("details li").first).to_be_visible()
            assert all(url.startswith("file:") for url in asked) and problems == [], (asked, problems)
            page.close()
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
