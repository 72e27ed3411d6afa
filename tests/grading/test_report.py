"""The report by itself: from made-up rows, without grading anything."""

import csv
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from classroom import ID, NAME, ROOT

from minillama4.course.doctor import BROWSERS
from minillama4.course.grading import report
from minillama4.course.grading.instructor import copies
from minillama4.course.grading.table import Table

NASTY = '=HYPERLINK("http://x","y") <b>Zoë & Søn</b>'
LONG = "x" * 300


def row(learner: str, solved: bool, mistake: str = "", like: str = "", text: str = "", notes=()) -> dict:
    part = {"id": ID, "points": float(solved), "of": 1.0, "solved": solved, "text": text or f"{ID}: solved",
            "step": mistake, "mistake": mistake, "like": like}  # fmt: skip
    return {"key": f"key-{abs(hash(learner))}", "learner": learner, "notebook": NAME, "file": f"{learner}/x.ipynb",
            "status": "graded", "points": float(solved), "of": 1.0, "exercises": [part], "notes": list(notes),
            "cells": {}, "seconds": {"run": 2.0, "own": 0.1}}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    rows = [row(f"learner {n}", True) for n in range(30)]
    rows += [
        row(f"with mistake {n}", False, "over tokens", "wrong_axis", f"{ID}: not yet\n  ✗ {LONG}") for n in range(3)
    ]
    rows += [row(NASTY, False, "no weight", "", f"{ID}: not yet\n<script>alert(1)</script>", ["@note", LONG])]
    with Table(out) as table:
        report.write_all(table, rows, [("a/<i>.txt", "not a notebook")], copies(ROOT / "solutions"), "2026", False)
    return out


class Page(HTMLParser):
    """What a reader without eyes needs, and whether tags close."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.words.append(data)


def pages(made) -> list[Page]:
    return [Page(file.read_text("utf-8")) for file in made.rglob("*.html")]


def test_every_page_is_whole_and_accessible(made):
    assert len(pages(made)) == 35
    for page in pages(made):
        tags = dict(page.tags)
        assert tags["html"]["lang"] == "en" and "title" in tags and "main" in tags and tags["meta"] is not None
        levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), "no level of heading is left out"
        assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
        assert all(attrs.get("aria-label") for tag, attrs in page.tags if tag == "meter")
        assert not any(tag in ("script", "img", "link", "iframe", "b", "i") for tag, _ in page.tags)
        assert not any(key.startswith("on") or "http" in str(value) for _, attrs in page.tags
                       for key, value in attrs.items() if key != "http-equiv")  # fmt: skip


def test_every_link_leads_somewhere(made):
    for file in made.rglob("*.html"):
        for tag, attrs in Page(file.read_text("utf-8")).tags:
            if tag == "a" and not attrs["href"].startswith("#"):
                assert (file.parent / attrs["href"]).is_file(), attrs["href"]


def test_the_index_says_what_a_teacher_asks(made):
    words = " ".join(" ".join(Page((made / "index.html").read_text("utf-8")).words).split())
    assert "34 learners" in words and "Seed 2026" in words and "30 of 34" in words
    assert "over tokens" in words and "wrong axis (3)" in words and "not a notebook" in words


def test_a_spreadsheet_takes_no_words_for_a_formula(made):
    with open(made / "grades.csv", encoding="utf-8-sig", newline="") as file:
        lines = list(csv.reader(file))
    cells = [cell for line in lines for cell in line]
    assert any("HYPERLINK" in cell for cell in cells)
    assert not any(cell[:1] in ("=", "+", "-", "@", "\t", "\r") for cell in cells)
    assert all(len(line) == len(lines[0]) for line in lines)


def test_the_report_in_a_browser_wide_and_narrow_and_by_keyboard(made):
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None or not find_spec("playwright"):
        why = "the report in a browser: no Chromium (apt-get install chromium) or no Playwright"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    shots = Path(os.environ.get("MINILLAMA4_SCREENSHOTS") or made.parent)
    shots.mkdir(parents=True, exist_ok=True)
    look = Path(__file__).with_name("look.py")
    done = subprocess.run([sys.executable, look, found, made, shots], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all((shots / f"{what}-{how}.png").exists() for what in ("report", "learner") for how in ("wide", "narrow"))
