"""Small changes to a reference solution, of the kinds that people make: every one must be rejected by its check."""

import ast
import copy
from collections.abc import Iterator

SWAPS = {ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mod],
         ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult], ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE],
         ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq],
         ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd], ast.And: [ast.Or], ast.Or: [ast.And],
         ast.MatMult: [ast.Mult]}  # fmt: skip
NAMES = {"mean": "sum", "sum": "mean", "max": "min", "min": "max", "amax": "amin", "argmax": "argmin", "sin": "cos",
         "cos": "sin", "sqrt": "square", "rsqrt": "sqrt", "softmax": "log_softmax", "sigmoid": "tanh", "exp": "log",
         "log": "exp", "floor": "ceil", "zeros": "ones", "ones": "zeros", "log_softmax": "softmax", "cat": "stack",
         "silu": "relu", "ceil": "floor"}  # fmt: skip


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the changed source), one change each."""
    tree = ast.parse(source)
    arguments = [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    for index, node in enumerate(ast.walk(tree)):
        for change in _changes(node, arguments):
            changed = copy.deepcopy(tree)
            twin = next(other for i, other in enumerate(ast.walk(changed)) if i == index)
            before = ast.unparse(node).strip().splitlines()[0]
            replacement = change(twin)
            if replacement is not twin:
                changed = _Replace(twin, replacement).visit(changed)
            ast.fix_missing_locations(changed)
            after = ast.unparse(replacement).strip().splitlines()[0] if replacement is not None else "(deleted)"
            text = ast.unparse(changed)
            if text != ast.unparse(tree):
                yield f"line {getattr(node, 'lineno', 0)}: {before}  ->  {after}", text


def _changes(node: ast.AST, arguments: list[str]) -> list:
    """Functions that take a twin of `node` and return what stands in its place. arguments: of the reference."""
    if isinstance(node, ast.BinOp):
        found = [lambda n, op=op: _with(n, op=op()) for op in SWAPS.get(type(node.op), [])]
        return [*found, lambda n: n.left, lambda n: n.right]
    if isinstance(node, ast.Compare):
        return [lambda n, op=op: _with(n, ops=[op(), *n.ops[1:]]) for op in SWAPS.get(type(node.ops[0]), [])]
    if isinstance(node, ast.BoolOp):
        return [lambda n, op=op: _with(n, op=op()) for op in SWAPS[type(node.op)]]
    if isinstance(node, ast.UnaryOp):
        return [lambda n: n.operand]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return [lambda n: ast.Constant(not n.value)]
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return [lambda n: ast.Constant(n.value + 1), lambda n: ast.Constant(n.value - 1)]
    if isinstance(node, ast.Call):
        found = [
            lambda n, i=i: _with(n, keywords=n.keywords[:i] + n.keywords[i + 1 :]) for i in range(len(node.keywords))
        ]
        if isinstance(node.func, ast.Attribute) and not _is_module(node.func.value):
            found.append(lambda n: n.func.value)  # x.square() -> x
        elif len(node.args) == 1:
            found.append(lambda n: n.args[0])  # torch.sqrt(x) -> x
        if len(node.args) >= 2:
            found.append(lambda n: _with(n, args=[n.args[1], n.args[0], *n.args[2:]]))
        return found
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        return [lambda n: _with(n, attr=NAMES[n.attr])]
    if isinstance(node, ast.Attribute) and node.attr in ("T", "mT", "H", "mH"):
        return [lambda n: n.value]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in arguments:
        return [lambda n: _with(n, id=arguments[arguments.index(n.id) - 1])]
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        return [lambda n: n.value]
    if isinstance(node, ast.IfExp):
        return [lambda n: n.body, lambda n: n.orelse]
    if isinstance(node, ast.If):
        return [lambda n: _with(n, test=ast.UnaryOp(ast.Not(), n.test))]
    if isinstance(node, ast.AugAssign):
        return [lambda n: None, *(lambda n, op=op: _with(n, op=op()) for op in SWAPS.get(type(node.op), []))]
    if isinstance(node, ast.Assign) or _is_call_statement(node):
        return [lambda n: None]
    return []


def _with(node: ast.AST, **fields) -> ast.AST:
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def _is_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "F", "math", "np", "nn")


def _is_call_statement(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST | None):
        self.old, self.new = old, new

    def visit(self, node: ast.AST):
        if node is self.old:
            return self.new if self.new is not None else ast.Pass() if isinstance(node, ast.stmt) else None
        return super().generic_visit(node)
