"""What nbval cannot see in a notebook, because it is not in what a cell prints. Read without running anything."""

import json
import re
from pathlib import Path

from minillama4.course.notebooks import MAX_BYTES

# Tags, and nbval's comment forms of them, after which a cell is compared less or not at all.
REASONS = {
    "nbval-ignore-output": "# not compared:",
    "nbval-skip": "# not compared:",
    "nbval-raises-exception": "# raises:",
    "raises-exception": "# raises:",
}
COMMENT_FORM = re.compile(r"^\s*#+\s*(NBVAL_\w+|PYTEST_VALIDATE_IGNORE_OUTPUT)\s*$", re.MULTILINE)
# A folder of one machine. Not in a URL, and not a word of the text such as `work/`.
MACHINE_PATH = re.compile(r"(?:(?<![\w.:/-])|file://)(?:/(?:work|home|root|tmp|Users)/|C:\\)")
NO_ALT = re.compile(r"!\[\s*\]\(|<img\b(?![^>]*\balt\s*=\s*[\"'][^\"'])[^>]*>")


def faults(file: Path, *, stub: bool = False) -> list[str]:
    """What is wrong with this notebook as it is stored, one line each; empty is good.

    stub: it is an exercise, in which every cell waits to be run; in all other notebooks every cell was.
    """
    text = file.read_text("utf-8")
    notebook = json.loads(text)
    found = []
    if len(text.encode()) > MAX_BYTES:
        found.append(f"{len(text.encode()) / 1e6:.1f} MB, and {MAX_BYTES / 1e6} MB is the limit")
    if "widgets" in notebook["metadata"]:
        found.append("metadata.widgets is there, which stops GitHub's reader; `make notebooks` takes it away")
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        outputs = cell.get("outputs", [])
        where = f"cell {number} ({cell.get('id')})"
        if MACHINE_PATH.search(source) or any(MACHINE_PATH.search(shown) for shown in _texts(outputs)):
            found.append(f"{where} names a folder of one machine")
        if cell["cell_type"] == "markdown" and NO_ALT.search(source):
            found.append(f"{where} has a picture without alt text")
        if cell["cell_type"] != "code":
            continue
        if stub and (outputs or cell["execution_count"] is not None):
            found.append(f"{where} was run; `make exercises` takes that away")
        if not stub and source.strip() and cell["execution_count"] is None:
            found.append(f"{where} was never run; `make notebooks` runs it")
        for reason, tag in _hidden(cell["metadata"].get("tags", []), source):
            if not re.search(rf"^\s*{reason}[ \t]*\S", source, re.MULTILINE):
                found.append(f"{where} is tagged {tag}, and no line `{reason} ...` says why")
        for html in (shown for output in outputs for shown in _html(output)):
            if NO_ALT.search(html):
                found.append(f"{where} shows a picture without alt text")
    return found


def _hidden(tags: list[str], source: str):
    """(the comment that is due, the tag), for each tag or marker comment that hides something of a cell."""
    markers = [marker.lower().replace("_", "-") for marker in COMMENT_FORM.findall(source)]
    for tag in [*tags, *markers]:
        if tag == "pytest-validate-ignore-output":
            yield REASONS["nbval-ignore-output"], tag
        elif tag in REASONS:
            yield REASONS[tag], tag


def _texts(outputs: list[dict]):
    for output in outputs:
        yield "".join(output.get("text", []))
        yield "".join(output.get("traceback", [])) + output.get("evalue", "")
        for kind, data in output.get("data", {}).items():
            if not kind.startswith("image/") or kind == "image/svg+xml":  # letters of a PNG may look like a path
                yield json.dumps(data) if isinstance(data, dict) else "".join(map(str, data))


def _html(output: dict):
    yield "".join(output.get("data", {}).get("text/html", []))
