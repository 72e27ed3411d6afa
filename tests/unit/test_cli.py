"""The command line as a person meets it: answers, explanations, and one clear line for whatever is wrong."""

import json
import re
import shutil
import struct
from random import Random

import pytest
from PIL import Image

from minillama4 import ask, load_tokenizer, scenes
from minillama4.checkpoint import WEIGHTS
from minillama4.cli import main

SHIPPED = WEIGHTS / "mini-scout"


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of one command; argparse's own exit counts too."""
    try:
        code = main(list(map(str, arguments)))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, tmp_path, *arguments) -> str:
    """The one line on stderr of a command that must fail, write nothing and print nothing else."""
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    assert sorted(tmp_path.rglob("*")) == before
    return err


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    scenes.render(scenes.draw_scene(Random(3), "held-out")).save(path)
    return path


def test_ask_prints_the_answer_that_the_function_gives(capsys, picture):
    code, out, err = run(capsys, "ask", picture, "How many objects are there?")
    assert code == 0 and err == "" and out.strip() == ask(picture, "How many objects are there?")
    assert re.fullmatch(r"[0-6]", out.strip())


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_ask_answers_in_the_language_of_the_question(capsys, picture, language):
    scene = scenes.draw_scene(Random(3), "held-out")
    question = scenes.ask(scene, Random(1), "place", language)
    code, out, _ = run(capsys, "ask", picture, question.text)
    assert code == 0 and out.strip() in question.choices


@pytest.mark.parametrize("size", [(1, 1), (20_000, 20)])
def test_a_picture_of_any_proportion_is_answered(capsys, tmp_path, size):
    path = tmp_path / "odd.png"
    Image.new("RGB", size, "red").save(path)
    code, out, err = run(capsys, "ask", path, "How many objects are there?")
    assert code == 0 and out.strip() and err == ""


def test_a_jpeg_four_times_as_large_gets_the_same_answer(tmp_path, picture):
    scene = scenes.draw_scene(Random(3), "held-out")
    scenes.render(scene, scale=4).save(tmp_path / "large.jpg", quality=95)
    question = "How many objects are there?"
    assert ask(tmp_path / "large.jpg", question) == ask(picture, question)


def test_a_question_without_a_picture(capsys):
    question, answer = scenes.GLOSSARY[0]
    code, out, _ = run(capsys, "ask", "-", question)
    assert code == 0 and out.strip() == answer


def test_explain_shows_layout_experts_and_time(capsys, picture):
    code, out, _ = run(capsys, "ask", picture, "How many objects are there?", "--explain")
    assert code == 0
    assert out.splitlines()[0] == "answer: " + ask(picture, "How many objects are there?")
    assert "16 x <|patch|>, <|tile_x_separator|>" in out and "<|image_end|>" in out
    rows = [line for line in out.splitlines() if re.match(r" *\d+[ >] ", line)]
    layout = re.search(r"layout of (\d+) prompt tokens", out)
    answer = load_tokenizer("mini-scout").encode(out.splitlines()[0].removeprefix("answer: "))
    assert len(rows) == int(layout[1]) + len(answer)
    experts = [row.split()[-8:] for row in rows]
    assert all(cell == "." or 0 <= int(cell) < 8 for row in experts for cell in row)
    prompt = int(layout[1])
    assert all("." not in row[:7] for row in experts[:prompt])  # only the last layer skips what it need not compute
    assert re.search(r"time: [\d.]+ ms to the first token", out)


def test_demo_is_right_three_times(capsys):
    code, out, _ = run(capsys, "demo")
    assert code == 0 and len(out.strip().splitlines()) == 3 and "right would be" not in out


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def test_a_text_file_named_png(capsys, tmp_path):
    path = tmp_path / "note.png"
    path.write_text("this is no picture")
    assert "note.png" in refused(capsys, tmp_path, "ask", path, "How many?")


def test_a_picture_over_100_megapixels(capsys, tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (11_000, 10_000)).save(path)
    assert "megapixels" in refused(capsys, tmp_path, "ask", path, "How many?")


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question(capsys, tmp_path, picture, question):
    assert "question is empty" in refused(capsys, tmp_path, "ask", picture, question)


def test_a_missing_picture(capsys, tmp_path):
    assert "nowhere.png" in refused(capsys, tmp_path, "ask", tmp_path / "nowhere.png", "How many?")


def test_a_truncated_safetensors_file(capsys, tmp_path, picture):
    folder = shutil.copytree(SHIPPED, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused(capsys, tmp_path, "ask", picture, "How many?", "--model", folder)


def test_a_safetensors_file_whose_header_lies(capsys, tmp_path, picture):
    folder = shutil.copytree(SHIPPED, tmp_path / "lies")
    weights = folder / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 10**15) + weights.read_bytes()[8:])
    assert "model.safetensors" in refused(capsys, tmp_path, "ask", picture, "How many?", "--model", folder)


def test_an_unknown_model_type(capsys, tmp_path, picture):
    folder = shutil.copytree(SHIPPED, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mllama"}))
    assert "'mllama'" in refused(capsys, tmp_path, "ask", picture, "How many?", "--model", folder)


def test_an_unknown_model(capsys, tmp_path, picture):
    assert "mini-scout" in refused(capsys, tmp_path, "ask", picture, "How many?", "--model", "mini-scuot")


def test_train_refuses_a_model_of_full_size(capsys, tmp_path):
    assert "mini-scout" in refused(capsys, tmp_path, "train", "scout", "--out", tmp_path / "run")
    assert "did you mean" in refused(capsys, tmp_path, "train", "mini-scot", "--out", tmp_path / "run")
