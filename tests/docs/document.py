"""Reads blocks of code, tables of numbers and prose of docs/rwkv7.md, and damages the blocks."""

import ast
import copy
import functools
import pathlib
import re
from collections.abc import Iterator

PATH = pathlib.Path(__file__).parents[2] / "docs" / "rwkv7.md"
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^<!-- table: (\w+) -->\n\n((?:\|.*\n)+)", re.MULTILINE)


@functools.cache
def text() -> str:
    return PATH.read_text(encoding="utf-8")


def fences() -> list[tuple[str, str]]:
    """Returns info string and content of every fenced block, in order."""
    return FENCE.findall(text())


@functools.cache
def blocks() -> dict[str, str]:
    """Returns the blocks of code by name, in order."""
    return {info.removeprefix("python "): code for info, code in fences()}


def prose() -> str:
    """Returns the page without fenced blocks and comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", text()))


def tables() -> dict[str, list[list[str]]]:
    """Returns the tables of numbers by name: rows of cells, without the heading."""
    return {
        name: [[cell.strip() for cell in row[1:-1].split("|")] for row in body.splitlines()[2:]]
        for name, body in TABLE.findall(text())
    }


def assigned_names(code: str) -> set[str]:
    """Returns the names that a block binds."""
    nodes = ast.walk(ast.parse(code))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Add,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
FUNCTIONS = {
    "exp": "expm1",
    "log": "log2",
    "sqrt": "abs",
    "tanh": "sin",
    "cumsum": "cumprod",
    "tril": "triu",
    "maximum": "minimum",
    "max": "min",
    "min": "max",
    "argmax": "argmin",
    "mean": "sum",
    "sum": "mean",
    "var": "std",
    "before": "after",
    "after": "from_here",
    "from_here": "after",
}


def _damage(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yields wrong replacements for a node, each with a description of the fault."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        wrong = copy.deepcopy(node)
        wrong.op = OPERATORS[type(node.op)]()
        yield wrong, "other operator"
    if isinstance(node, ast.Compare):
        wrong = copy.deepcopy(node)
        wrong.ops = [OPERATORS[type(op)]() for op in node.ops]
        yield wrong, "negated comparison"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield ast.BinOp(ast.Constant(2), ast.Mult(), copy.deepcopy(node)), "doubled product"
    if isinstance(node, ast.UnaryOp):
        yield node.operand, "sign left out"
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(2 * node.value + (type(node.value) is int)), "other constant"
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield node.value, "transpose left out"
    if isinstance(node, ast.Attribute) and node.attr in FUNCTIONS:
        yield ast.Attribute(node.value, FUNCTIONS[node.attr], node.ctx), "other function"
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in FUNCTIONS:
        yield ast.Name(FUNCTIONS[node.id], node.ctx), "other function"
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "outer":
        left, right = node.args
        if ast.dump(left) != ast.dump(right):
            yield ast.Call(node.func, [right, left], []), "outer product turned"
    if isinstance(node, ast.AugAssign):
        yield ast.Pass(), "statement left out"
    if isinstance(node, ast.Assign):
        yield ast.Assign(node.targets, ast.Constant(float("nan"))), "statement spoilt"


class _Replace(ast.NodeTransformer):
    def __init__(self, position: int, replacement: ast.AST):
        self.position, self.replacement, self.seen = position, replacement, -1

    def visit(self, node: ast.AST) -> ast.AST:
        self.seen += 1
        if self.seen == self.position:
            return self.replacement
        return self.generic_visit(node)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yields all nodes in the order in which `_Replace` visits them."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _walk(child)


def mutants(code: str) -> Iterator[tuple[str, str]]:
    """Yields copies of a block with one fault each, and a description of the fault."""
    tree = ast.parse(code)
    for position, node in enumerate(_walk(tree)):
        for replacement, fault in _damage(node):
            wrong = _Replace(position, replacement).visit(copy.deepcopy(tree))
            line = code.splitlines()[getattr(node, "lineno", 1) - 1].strip()
            wrong = ast.unparse(ast.fix_missing_locations(wrong))
            yield wrong, f"{fault} ({ast.unparse(node)}) in: {line}"
