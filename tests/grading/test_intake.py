"""Submissions as they come, without grading them."""

import io
import os
import stat
import zipfile

import pytest
from classroom import ID, NAME, RIGHT, ROOT, notebook, save

from minillama4.course.grading import intake, plan
from minillama4.course.grading.instructor import copies

NOTEBOOK = f"{NAME}.ipynb"


@pytest.fixture(scope="module")
def known():
    return copies(ROOT / "solutions")


@pytest.fixture(scope="module")
def data():
    import json

    return json.dumps(notebook(RIGHT)).encode()


def learners(place, known) -> dict[str, str]:
    """Learner -> file."""
    found, _ = intake.collect(place, known)
    return {submission.learner: submission.file.path for submission in found}


def zipped(entries: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out.getvalue()


def lay(folder, entries: dict[str, bytes]):
    for name, content in entries.items():
        save(content, folder / name)


LAYOUTS = {
    "a folder a learner": ([f"jane/{NOTEBOOK}", f"Zoë Müller/{NOTEBOOK}"], ["Zoë Müller", "jane"]),
    "deeper folders": ([f"jane/week 1/{NOTEBOOK}", f"bob/{NOTEBOOK}"], ["bob", "jane"]),
    "a folder around them": ([f"class/jane/{NOTEBOOK}", f"class/bob/{NOTEBOOK}"], ["bob", "jane"]),
    "one learner alone": ([f"jane/{NOTEBOOK}"], ["jane"]),
    "nbgrader": ([f"submitted/jane/start/{NOTEBOOK}", f"submitted/bob/start/{NOTEBOOK}",
                  f"source/start/{NOTEBOOK}", f"release/start/{NOTEBOOK}"], ["bob", "jane"]),
    "flat": ([f"jane_{NOTEBOOK}", f"{NAME}-bob.ipynb", f"Zoë Müller {NAME} (1).ipynb"], ["Zoë Müller", "bob", "jane"]),
    "Moodle": ([f"Jane Doe_123_assignsubmission_file_/{NOTEBOOK}", f"Jane Doe_124_assignsubmission_file_/{NOTEBOOK}"],
               ["Jane Doe_123", "Jane Doe_124"]),
    "Canvas": ([f"doejane_LATE_123_98765_{NOTEBOOK}", f"roebob_124_98766_{NAME}-2.ipynb"],
               ["doejane_123", "roebob_124"]),
    "Blackboard": ([f"Start_jane_attempt_2026-11-24-10-00-00_{NOTEBOOK}",
                    f"Start_bob_attempt_2026-11-24-10-05-00_{NOTEBOOK}"], ["bob", "jane"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_every_layout_gives_the_learners(layout, packed, known, data, tmp_path):
    names, expected = LAYOUTS[layout]
    if packed and layout == "nbgrader":
        names = names[:2]
    entries = dict.fromkeys(names, data)
    place = tmp_path / ("class.zip" if packed else "class")
    if packed:
        place.write_bytes(zipped(entries))
    else:
        lay(place, entries)
    assert sorted(learners(place, known)) == sorted(expected)


def test_zip_files_of_learners_and_zip_files_in_zip_files(known, data, tmp_path):
    inner = zipped({f"my work/{NOTEBOOK}": data})
    lay(tmp_path / "class", {"jane.zip": inner, "bob.ZIP": zipped({"again.zip": inner}), f"zoe/{NOTEBOOK}": data})
    assert sorted(learners(tmp_path / "class", known)) == ["bob", "jane", "zoe"]


def test_zip_files_deeper_than_three_are_refused(known, data, tmp_path):
    deep = zipped({NOTEBOOK: data})
    for _ in range(3):
        deep = zipped({"in.zip": deep})
    lay(tmp_path, {"jane.zip": deep, f"bob/{NOTEBOOK}": data})
    found, left = intake.collect(tmp_path, known)
    assert [s.learner for s in found] == ["bob"] and "more than 3 deep" in dict(left)["jane.zip/in.zip/in.zip/in.zip"]


def test_accents_of_a_zip_file_without_the_flag_for_them(known, data, tmp_path):
    packed = zipped({f"Zoë/{NOTEBOOK}": data, f"bob/{NOTEBOOK}": data})
    flag = int.from_bytes(b"\x00\x08", "little")
    assert flag == 0x800
    unflagged = packed.replace(b"\x00\x08\x08\x00", b"\x00\x00\x08\x00")  # flags, then "deflated"
    assert unflagged != packed
    (tmp_path / "class.zip").write_bytes(unflagged)
    assert sorted(learners(tmp_path / "class.zip", known)) == ["Zoë", "bob"]


@pytest.mark.parametrize("name", ["../x.ipynb", "/etc/x.ipynb", "a/../../x.ipynb", "C:/x.ipynb", "..\\x.ipynb"])
def test_names_that_lead_out_of_a_zip_file_are_refused(name, known, data, tmp_path):
    (tmp_path / "class.zip").write_bytes(zipped({name: data, f"jane/{NOTEBOOK}": data, f"bob/{NOTEBOOK}": data}))
    found, left = intake.collect(tmp_path / "class.zip", known)
    assert sorted(s.learner for s in found) == ["bob", "jane"]
    assert any("leads out" in why for _, why in left)
    assert list(tmp_path.iterdir()) == [tmp_path / "class.zip"]


def test_a_link_in_a_zip_file_is_refused(known, data, tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        entry = zipfile.ZipInfo(f"jane/{NOTEBOOK}")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
        archive.writestr(f"bob/{NOTEBOOK}", data)
    (tmp_path / "class.zip").write_bytes(out.getvalue())
    found, left = intake.collect(tmp_path / "class.zip", known)
    assert [s.learner for s in found] == ["bob"] and "symbolic link" in dict(left)[f"class.zip/jane/{NOTEBOOK}"]


def test_a_bomb_is_not_unpacked(known, data, tmp_path):
    bomb = zipped({f"jane/{NOTEBOOK}": b"0" * 50_000_000, f"bob/{NOTEBOOK}": data})
    assert len(bomb) < 100_000
    (tmp_path / "class.zip").write_bytes(bomb)
    found, _ = intake.collect(tmp_path / "class.zip", known)
    jane = next(s for s in found if s.learner == "jane")
    assert "50 MB, and a notebook may have 10 MB" in jane.unreadable and not jane.file.data


def test_a_bomb_that_lies_about_its_size_is_not_unpacked(known, data, tmp_path):
    size = 50_000_000
    packed = zipped({f"jane/{NOTEBOOK}": b"0" * size, f"bob/{NOTEBOOK}": data})
    lie = packed.replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    assert lie != packed
    (tmp_path / "class.zip").write_bytes(lie)
    found, _ = intake.collect(tmp_path / "class.zip", known)
    jane = next(s for s in found if s.learner == "jane")
    assert jane.unreadable and len(jane.file.data) <= 1000


def test_broken_and_encrypted_zip_files_are_listed(known, data, tmp_path):
    lay(tmp_path, {"jane.zip": b"PK\x03\x04 no zip file", f"bob/{NOTEBOOK}": data})
    _, left = intake.collect(tmp_path, known)
    assert "broken zip file" in dict(left)["jane.zip"]


def test_the_newest_of_several_counts_and_that_is_said(known, data, tmp_path):
    other = data.replace(b"torch.rsqrt", b"torch. rsqrt")
    lay(tmp_path, {f"jane/{NOTEBOOK}": data, f"jane/{NAME} (1).ipynb": other, f"bob/{NOTEBOOK}": data})
    os.utime(tmp_path / "jane" / NOTEBOOK, (1_000, 1_000))
    os.utime(tmp_path / "jane" / f"{NAME} (1).ipynb", (2_000, 2_000))
    found, left = intake.collect(tmp_path, known)
    jane = next(s for s in found if s.learner == "jane")
    assert jane.file.path == f"jane/{NAME} (1).ipynb" and "more than once" in " ".join(jane.notes)
    assert "counts" in dict(left)[f"jane/{NOTEBOOK}"]


def test_learners_whose_names_look_alike_are_two(known, data, tmp_path):
    lay(tmp_path, {f"Zoe/{NOTEBOOK}": data, f"Zoë/{NOTEBOOK}": data, f"zoe/{NOTEBOOK}": data})
    found, _ = intake.collect(tmp_path, known)
    assert len(found) == 3 and len({s.key for s in found}) == 3


def test_a_renamed_notebook_is_known_by_its_cells(known, data, tmp_path):
    lay(tmp_path, {"jane/my homework.ipynb": data, f"bob/{NOTEBOOK}": data})
    found, _ = intake.collect(tmp_path, known)
    jane = next(s for s in found if s.learner == "jane")
    assert jane.copy.name == NAME and "was called my homework.ipynb" in jane.notes[0]


def test_what_is_no_submission_is_listed_with_the_reason(known, data, tmp_path):
    foreign = b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}'
    lay(tmp_path, {f"jane/{NOTEBOOK}": data, "jane/notes.txt": b"x", "jane/other.ipynb": foreign,
                   f"jane/.ipynb_checkpoints/{NOTEBOOK}": data, "jane/00_start_here.backup-20261124-1530.ipynb": data,
                   NOTEBOOK: data})  # fmt: skip
    os.mkfifo(tmp_path / "jane" / "pipe.ipynb")
    found, left = intake.collect(tmp_path, known)
    assert [s.learner for s in found] == ["jane"]
    why = dict(left)
    assert why["jane/notes.txt"] == "not a notebook" and "none of the course's" in why["jane/other.ipynb"]
    assert "whose it is" in why[NOTEBOOK] and why["jane/pipe.ipynb"] == "not a regular file"
    assert len(why) == 6


@pytest.mark.parametrize("make", ["missing", "empty", "a file"])
def test_a_place_without_submissions_is_one_line(make, known, tmp_path):
    place = tmp_path / "place"
    if make == "empty":
        place.mkdir()
    elif make == "a file":
        place.write_text("x")
    with pytest.raises(ValueError, match="no submission in|no folder and no zip file"):
        intake.collect(place, known)


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def planned(made: dict, known):
    import json

    return plan.plan(plan.parse(json.dumps(made).encode()), known[NAME])


def answers(made) -> list[str]:
    return ["".join(cell["source"]) for cell in made.cells if ID in cell["tasks"]]


def test_check_cells_do_not_run_and_all_else_does(known):
    made = planned(notebook(RIGHT, before="helper = 1"), known)
    sources = [cell["source"] for cell in made.cells]
    assert not any(source.startswith("check(") for source in sources) and "helper = 1" in sources
    assert len(answers(made)) == 1 and made.notes == []


def test_moved_copied_and_renamed_cells_are_found_and_reported(known):
    moved = notebook(RIGHT)
    at = next(i for i, cell in enumerate(moved["cells"]) if cell["id"] == "rms-norm-answer")
    moved["cells"].append(moved["cells"].pop(at))
    assert len(answers(planned(moved, known))) == 1

    copied = notebook(RIGHT)
    copied["cells"].append({**copied["cells"][at], "id": "copied"})
    assert len(answers(planned(copied, known))) == 2 and "2 cells answer" in planned(copied, known).notes[0]

    for lost in ("metadata", "both"):
        cell = (renamed := notebook(RIGHT))["cells"][at]
        cell["metadata"] = {}
        if lost == "both":
            cell["id"] = "something-else"
        made = planned(renamed, known)
        assert len(answers(made)) == 1
        assert ("has lost its ids" in " ".join(made.notes)) == (lost == "both")


def test_a_renamed_function_is_found(known):
    made = planned(notebook(RIGHT.replace("def rms_norm", "def my_norm")), known)
    assert made.names[ID] == "my_norm" and "renamed to my_norm" in made.notes[0]


def test_a_missing_answer_is_said(known):
    made = notebook(RIGHT)
    made["cells"] = [cell for cell in made["cells"] if cell["id"] != "rms-norm-answer"]
    assert f"there is no answer to {ID}" in planned(made, known).notes
