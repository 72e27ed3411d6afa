"""Attacks: none changes a verdict, reads what it should not, harms another result or leaves a process."""

import attacks
import pytest

NAMES = list(attacks.attacks("/report", "/solutions", "/other", 1, "/mark"))


@pytest.mark.parametrize("name", NAMES)
def test_the_verdict_is_the_one_that_the_answer_deserves(attacked, name):
    attack, part = attacked.attacks[name], attacked.report.part(name)
    row = attacked.report.rows[name]
    assert part["solved"] == attack.solved, part["text"]
    assert part["points"] == (1 if attack.solved else 0)
    if attack.mistake:
        assert part["mistake"] == attack.mistake, part["text"]
    assert len(row["cells"]) >= attack.cells, row["cells"]
    assert "LEAK" not in str(row)


def test_nobody_else_is_harmed(attacked):
    assert attacked.report.part("a bystander")["solved"]
    assert len(attacked.report.rows) == len(attacked.attacks) + 2, "each is there once"


def test_no_process_is_left(attacked):
    assert attacked.rooms == []


def test_nothing_was_written_outside_and_no_connection_made(attacked):
    assert attacked.marks == [] and not attacked.connected


def test_files_beside_a_notebook_are_listed_and_not_used(attacked):
    for name in attacked.attacks["files beside the notebook"].files:
        assert attacked.report.left_out[f"files beside the notebook/{name}"] == "not a notebook"


def test_links_are_refused(attacked):
    assert "symbolic link" in attacked.report.left_out["symlink/00_start_here.ipynb"]
    assert "symbolic link" in attacked.report.left_out["linked folder"]
    assert "symlink" not in attacked.report.rows


def test_a_notebook_of_200_mb_is_not_read(attacked):
    part = attacked.report.part("200 MB")
    assert not part["solved"] and "200 MB, and a notebook may have 10 MB" in part["text"]


def test_the_report_shows_a_learners_words_as_words(attacked):
    pages = "".join(file.read_text("utf-8") for file in attacked.out.rglob("*.html"))
    assert "<script" not in pages and "&lt;script&gt;alert(1)" in pages and "\x1b" not in pages


def test_what_was_unusual_is_said(attacked):
    notes = {name: " ".join(row["notes"]) for name, row in attacked.report.rows.items()}
    assert "was deleted; the instructor's own was run" in notes["deleted check cell"]
    assert "was edited; the instructor's own was run" in notes["edited check cell"]
    assert "asks for the kernel" in notes["wrong kernel name"]
    assert "was left out: the process died" in notes["os._exit in a cell"]
