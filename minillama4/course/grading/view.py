"""What the sandbox sees of the package: no answers, no judges, no hints.

Of a check's file only `observe` and what it uses, also of other files of the course. Of the package everything, but the
functions that would answer the exercises only have a name. Of the course, what an exercise's notebook imports.
"""

import ast
import inspect
import pkgutil
import shutil
from pathlib import Path

from .. import exercise

PACKAGE = Path(__file__).resolve().parents[2]
COURSE = ("observe.py", "exercise.py", "figures.py", "widgets")  # of course/; the rest checks, makes or grades
HERE = ("box.py", "lite.py", "wire.py")  # of grading/: what runs in there
DATA = {".safetensors", ".png", ".jpg", ".pt", ".bin"}  # large, and no exercise asks for it

GONE = "is not there while you are graded: it would answer the exercise"  # `judge.py` knows it by this

STAND_INS = '''"""What a notebook imports from here; while it is graded, its checks are run elsewhere."""


class CheckFailed(AssertionError):
    pass


def check(id, function, seed=None):
    pass


def hint(id):
    pass


def progress():
    pass


__all__ = ["CheckFailed", "check", "hint", "progress"]
'''


def build(folder: Path, exercises: tuple[str, ...]) -> Path:
    """Write the view in which `exercises` are not answered to `folder` (new), and return it."""
    answers: dict[Path, set[str]] = {}
    for id in exercises:
        for name in exercise.find(id).module.ANSWERED_BY:
            if name.startswith("minillama4."):
                file, qualname = _source(name)
                answers.setdefault(file, set()).add(qualname)
    package = folder / "minillama4"
    for file in sorted(PACKAGE.rglob("*")):
        within = file.relative_to(PACKAGE)
        if not file.is_file() or "__pycache__" in within.parts or file.suffix in DATA or not _shown(within):
            continue
        target = package / within
        target.parent.mkdir(parents=True, exist_ok=True)
        if file in answers:
            target.write_text(without(file.read_text("utf-8"), answers[file], str(within)), "utf-8")
        else:
            shutil.copyfile(file, target)
    course = package / "course"
    (course / "checks").mkdir(parents=True, exist_ok=True)
    (course / "__init__.py").write_text(STAND_INS, "utf-8")
    (course / "checking.py").write_text(STAND_INS, "utf-8")
    (course / "checks" / "__init__.py").write_text("", "utf-8")
    checks = [Path(exercise.find(id).module.__file__).resolve() for id in exercises]
    for file, text in observing(checks).items():
        target = package / file.relative_to(PACKAGE)
        if not target.exists():  # else it is one of COURSE, and whole
            target.write_text(text, "utf-8")
    for name in HERE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    return folder


def _shown(within: Path) -> bool:
    return within.parts[0] != "course" or (len(within.parts) > 1 and within.parts[1] in COURSE)


def _source(name: str) -> tuple[Path, str]:
    """(file, "Class.method") of an answer, wherever else its name is imported."""
    target = inspect.unwrap(pkgutil.resolve_name(name))
    return Path(inspect.getsourcefile(target)).resolve(), target.__qualname__


def without(text: str, names: set[str], where: str) -> str:
    """The source with these functions and classes emptied: their names stay, so that what imports them still loads.

    ValueError: one of them is not a function or class of this file.
    """
    tree, left = ast.parse(text), set(names)

    def visit(body: list, above: str):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                qualname = above + node.name
                if qualname in names:
                    left.discard(qualname)
                    _empty(node, f"{where.removesuffix('.py').replace('/', '.')}.{qualname}")
                elif isinstance(node, ast.ClassDef):
                    visit(node.body, f"{qualname}.")

    visit(tree.body, "")
    if left:
        raise ValueError(f"{where} has no function or class {', '.join(sorted(left))} that could be taken out")
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _empty(node, name: str):
    gone = ast.parse(f"raise RuntimeError({f'minillama4.{name} {GONE}'!r})").body
    if isinstance(node, ast.ClassDef):
        init = ast.parse("def __init__(self, *arguments, **named):\n    pass").body[0]
        init.body = gone
        node.body, node.decorator_list = [init], []
    else:
        node.body, node.decorator_list = gone, []


def observing(checks: list[Path]) -> dict[Path, str]:
    """The sources of these checks and of what their `observe` imports from other files of the course, cut down to it.

    ValueError: as in `kept`.
    """
    needed = {file: {"observe", "ANSWERED_BY"} for file in checks}
    texts, todo = {}, list(checks)
    while todo:
        file = todo.pop()
        texts[file] = kept(file.read_text("utf-8"), needed[file])
        for other, names in _imported(texts[file], file):
            if not names <= needed.setdefault(other, set()) or other not in texts:
                needed[other] |= names
                todo.append(other)
    return texts


def kept(text: str, names: set[str]) -> str:
    """Of a source: these names, and what they use of the same file, directly or not.

    ValueError: they use `judge` or `draw`, which would thus be shown to a learner's code.
    """
    tree = ast.parse(text)
    makes = {}  # name -> the statement that defines it
    for node in tree.body:
        for name in _makes(node):
            makes[name] = node
    wanted, todo = {}, list(names)
    while todo:
        node = makes.get(todo.pop())
        if node is None or id(node) in wanted:
            continue
        wanted[id(node)] = node
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        todo += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    for name in ("judge", "draw"):
        if id(makes.get(name)) in wanted:
            raise ValueError(f"observe uses {name}, which must not run beside a learner's code")
    used = {part.id for node in wanted.values() for part in ast.walk(node) if isinstance(part, ast.Name)} | names
    tree.body = [_imports(node, used) for node in tree.body if id(node) in wanted]
    return ast.unparse(tree) + "\n"


def _imported(text: str, file: Path) -> list[tuple[Path, set[str]]]:
    """(file of the course, what is used of it) for each relative import in a source that `kept` has cut down."""
    tree, found = ast.parse(text), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = file.parents[node.level - 1]
        if node.module is None:  # from .. import bug_hunt: of which names are used as attributes
            for alias in node.names:
                local = alias.asname or alias.name
                names = {
                    part.attr
                    for part in ast.walk(tree)
                    if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == local
                }
                found.append((base / f"{alias.name}.py", names))
        else:
            found.append((base / f"{node.module.replace('.', '/')}.py", {alias.name for alias in node.names}))
    return [(path, names) for path, names in found if path.is_file() and (PACKAGE / "course") in path.parents]


def _makes(node) -> list[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _imports(node, used: set[str]):
    """An import line without the names that only `draw` and `judge` needed."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        node.names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in used]
    return node
