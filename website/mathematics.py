"""Writes statements of NumPy as mathematics, in LaTeX, which the site shows beside the code.

The formulas of docs/rwkv7.md are code that a test executes. So the mathematics on the page is made
from what was executed, and cannot differ from it.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator

SUM, ENTRYWISE, PRODUCT, POWER, INDEXED, ATOM = range(
    6
)  # how strongly the outermost operation binds

GREEK = {"alpha": r"\alpha", "kk": r"\hat{\kappa}", "eps": r"\epsilon"}
SCALARS = {"scale", "rate", "shrink", "L", "K", "V", "T", "size", "state_size", "l2wrap", "rates"}
COMPARISONS = {
    ast.Eq: "=",
    ast.NotEq: r"\neq",
    ast.Gt: ">",
    ast.GtE: r"\geq",
    ast.Lt: "<",
    ast.LtE: r"\leq",
}


class NotMathematics(ValueError):  # noqa: N818
    """The statement has no formula; the page shows its code."""


def formulas(code: str) -> list[tuple[int, str, str]]:
    """Returns depth, LaTeX and comment of each statement.

    Raises:
      NotMathematics: a statement is not known here.
    """
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type == tokenize.COMMENT
    }
    lines = [
        (depth, latex, next((comments[i] for i in places if i in comments), ""))
        for node in ast.parse(code).body
        for depth, latex, places in _statement(node, 0)
    ]
    if not any("=" in latex for _, latex, _ in lines):
        raise NotMathematics(code)
    return lines


def _statement(node: ast.stmt, depth: int) -> Iterator[tuple[int, str, range]]:
    last = getattr(node, "end_lineno", None) or node.lineno
    places = range(node.lineno, last + 1)
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            for name, value in zip(names, values, strict=True):
                yield depth, f"{_tex(name)} = {_tex(value)}", places
        case ast.Assign(targets=[target], value=value):
            yield depth, f"{_tex(target)} = {_tex(value)}", places
        case ast.AugAssign(target=target, value=value, op=ast.Add() | ast.Sub() as op):
            sign = "+" if isinstance(op, ast.Add) else "-"
            yield depth, rf"{_tex(target)} \mathrel{{{sign}}}= {_tex(value)}", places
        case ast.For(target=target, iter=over, body=body):
            head = rf"\text{{for }} {_tex(target)} {_range(over)}\text{{:}}"
            yield depth, head, range(node.lineno, node.lineno + 1)
            for inner in body:
                yield from _statement(inner, depth + 1)
        case ast.FunctionDef(body=body):
            arguments = ", ".join(_name(x.arg) for x in node.args.args)
            *before, result = body
            if not isinstance(result, ast.Return) or result.value is None:
                raise NotMathematics(node.name)
            if not all(isinstance(inner, ast.Assign) for inner in before):
                raise NotMathematics(node.name)
            head = rf"\text{{{_plain(node.name)}}}({arguments})"
            where = r"\text{, where}" if before else ""
            line = range(node.lineno, node.lineno + 1)
            yield depth, f"{head} = {_tex(result.value)}{where}", line
            for inner in before:
                yield from _statement(inner, depth + 1)
        case _:
            raise NotMathematics(ast.unparse(node))


def _range(node: ast.expr) -> str:
    match node:
        case ast.Call(
            func=ast.Name(id="range"),
            args=[ast.BinOp(left=end, op=ast.Add(), right=ast.Constant(value=1))],
        ):
            return rf"= 0, \dots, {_tex(end)}"
        case ast.Call(func=ast.Name(id="range"), args=[end]):
            return rf"= 0, \dots, {_tex(end)} - 1"
        case ast.Call(
            func=ast.Name(id="reversed"), args=[ast.Call(func=ast.Name(id="range"), args=[end])]
        ):
            return rf"= {_tex(end)} - 1, \dots, 0"
        case ast.Call(func=ast.Name(id=name), args=[x]):
            return rf"\in \text{{{_plain(name)}}}({_tex(x)})"
    raise NotMathematics(ast.unparse(node))


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _name(name: str) -> str:
    """Returns the symbol of a variable: a gradient, a letter with an index, or a word."""
    if name in GREEK:
        return GREEK[name]
    if len(name) == 1:
        return name
    if (
        re.fullmatch(r"d([A-Za-z]\d?|kk|[A-Za-z]_\w+|[a-z]+_?\w*)", name)
        and name not in _WORDS_WITH_D
    ):
        space = r"\," if len(name.partition("_")[0]) > 3 else ""
        return rf"\text{{d}}{space}{_name(name[1:])}"
    if match := re.fullmatch(r"([A-Za-z])(\d)(?:_(\w+))?", name):
        letter = rf"\text{{{match[1]}{match[2]}}}"  # as in the text; an index is that of a token
        return rf"\hat{{{letter}}}" if match[3] == "hat" else letter
    letter, _, index = name.partition("_")
    if index == "hat" and len(letter) == 1:
        return rf"\hat{{{letter}}}"
    if index and (len(letter) == 1 or letter in ("dS", "kk")):
        index = index if len(index) == 2 and letter.isupper() else rf"\text{{{_plain(index)}}}"
        return rf"{_name(letter)}_{{{index}}}"
    return rf"\text{{{_plain(name)}}}"


_WORDS_WITH_D = {"decay", "decayed", "decay_logits", "down", "deviation", "destination", "delta"}


def _tex(node: ast.AST, least: int = SUM) -> str:
    """Returns LaTeX, in parentheses if the operation binds less strongly than `least`."""
    text, strength = _expression(node)
    return text if strength >= least else rf"\left({text}\right)"


def _expression(node: ast.AST) -> tuple[str, int]:
    match node:
        case ast.Name(id=name):
            return _name(name), ATOM
        case ast.Attribute(value=ast.Name(id="np"), attr="inf"):
            return r"\infty", ATOM
        case ast.Tuple(elts=parts):
            return ", ".join(map(_tex, parts)), SUM
        case ast.List(elts=parts):
            return rf"\left({', '.join(map(_tex, parts))}\right)", ATOM
        case ast.GeneratorExp(elt=x, generators=[over]):
            if not isinstance(over.iter, ast.Tuple):
                raise NotMathematics(ast.unparse(node))
            return rf"{_tex(x)} \text{{ for }} {_tex(over.target)} = {_tex(over.iter)}", SUM
        case ast.Constant(value=bool() | str() | None):
            raise NotMathematics(ast.unparse(node))
        case ast.Constant(value=value):
            if 0 < abs(value) < 1e-3:
                digits, _, power = f"{value:e}".partition("e")
                return rf"{float(digits):g} \cdot 10^{{{int(power)}}}", PRODUCT
            return f"{value:g}" if value < 1e6 else str(value), ATOM
        case ast.UnaryOp(op=ast.USub(), operand=x):
            return f"-{_tex(x, ENTRYWISE)}", SUM
        case ast.BinOp(left=left, op=op, right=right):
            return _operation(left, op, right)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            return rf"\left[{_tex(left)} {COMPARISONS[type(op)]} {_tex(right)}\right]", ATOM
        case ast.Attribute(value=x, attr="T"):
            return rf"{_tex(x, INDEXED)}^{{\intercal}}", POWER
        case ast.Subscript(value=x, slice=index):
            return _element(x, index)
        case ast.Call(func=ast.Attribute(value=module, attr=name), args=args) if ast.unparse(
            module
        ) in ("np", "np.linalg"):
            return _function(name, args, node)
        case ast.Call(
            func=ast.Attribute(value=x, attr="max" | "min" | "sum" | "mean" | "var" as f)
        ):
            return _reduction(f, x, node), ENTRYWISE
        case ast.Call(func=ast.Name(id="len"), args=[x]):
            return rf"\text{{len}}({_tex(x)})", ATOM
        case ast.Call(func=ast.Name(id="sum"), args=[ast.GeneratorExp() as terms]):
            return _sum_of(terms), ENTRYWISE
        case ast.Call(func=ast.Name(id=name), args=args):
            return rf"\text{{{_plain(name)}}}({', '.join(map(_tex, args))})", ATOM
        case ast.ListComp(elt=x, generators=[over]):
            return rf"\left[{_tex(x)}\right]_{{{_tex(over.target)} {_range(over.iter)}}}", ATOM
    raise NotMathematics(ast.unparse(node))


def _operation(left: ast.expr, op: ast.operator, right: ast.expr) -> tuple[str, int]:
    match op, left:
        case ast.Add(), _:
            return f"{_tex(left)} + {_tex(right)}", SUM
        case ast.Sub(), _:
            return f"{_tex(left)} - {_tex(right, ENTRYWISE)}", SUM
        case ast.Div() | ast.FloorDiv(), _:
            fraction = rf"\frac{{{_tex(left)}}}{{{_tex(right)}}}"
            floor = rf"\left\lfloor {fraction} \right\rfloor"
            return (fraction if isinstance(op, ast.Div) else floor), POWER
        case ast.Pow(), _:
            return rf"{_tex(left, INDEXED)}^{{{_tex(right)}}}", POWER
        case ast.MatMult(), ast.Name(id=name) if ast.unparse(right) == name:
            return rf"{_name(name)}^{{\intercal}} {_name(name)}", PRODUCT
        case ast.MatMult(), _:
            return rf"{_tex(left, PRODUCT)} \, {_tex(right, PRODUCT)}", PRODUCT
        case ast.Mult(), ast.Subscript(value=x, slice=index) if _is_column(index):
            return rf"\operatorname{{diag}}({_tex(x)}) \, {_tex(right, PRODUCT)}", PRODUCT
        case ast.Mult(), _:
            sign = r"\cdot" if _is_scalar(left) or _is_scalar(right) else r"\odot"
            return rf"{_tex(left, ENTRYWISE)} {sign} {_tex(right, ENTRYWISE)}", ENTRYWISE
        case ast.BitAnd(), _:
            return rf"{_tex(left)} \wedge {_tex(right)}", SUM
    raise NotMathematics(ast.dump(op))


def _is_scalar(node: ast.expr) -> bool:
    match node:
        case ast.Name(id=name):
            return name in SCALARS
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _is_scalar(left) and _is_scalar(right)
        case ast.UnaryOp(operand=x):
            return _is_scalar(x)
    return isinstance(node, ast.Constant)


def _is_column(index: ast.expr) -> bool:
    return ast.unparse(index) in ("(:, None)", ":, None")


def _element(x: ast.expr, index: ast.expr) -> tuple[str, int]:
    if _is_column(index):
        return _with_index(x, "i"), INDEXED
    if ast.unparse(index) == "None":
        return _with_index(x, "j"), INDEXED
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return _with_index(x, ", ".join(map(_slice, parts))), INDEXED


def _with_index(x: ast.expr, index: str) -> str:
    text = _tex(x, ATOM)
    return f"{text}[{index}]" if text.endswith("}") and "_{" in text else f"{text}_{{{index}}}"


def _slice(node: ast.expr) -> str:
    if not isinstance(node, ast.Slice):
        return _tex(node)
    ends = [_tex(x) if x is not None else "" for x in (node.lower, node.upper)]
    step = f":{_tex(node.step)}" if node.step else ""
    return rf"{ends[0]}\!:\!{ends[1]}{step}"


def _reduction(name: str, x: ast.expr, node: ast.Call) -> str:
    sign = r"\sum" if name == "sum" else rf"\operatorname{{{name}}}"
    axis = next((ast.unparse(k.value) for k in node.keywords if k.arg == "axis"), None)
    if axis not in _AXES:
        raise NotMathematics(ast.unparse(node))
    along = _AXES[axis]
    below = rf"_{{{along}}}" if along else ""
    strength = ATOM if name != "sum" else ENTRYWISE
    return rf"{sign}{below} {_tex(x, strength)}"


_AXES = {"0": "t", "1": "c", "2": "c", None: ""}
"""Indices that are summed over: tokens are rows, channels are columns."""


def _sum_of(terms: ast.GeneratorExp) -> str:
    (over,) = terms.generators
    return rf"\sum_{{{_tex(over.target)} {_range(over.iter)}}} {_tex(terms.elt, ENTRYWISE)}"


def _function(name: str, args: list[ast.expr], node: ast.Call) -> tuple[str, int]:
    special: dict[str, Callable[[], tuple[str, int]]] = {
        "exp": lambda: (rf"e^{{{_tex(args[0])}}}", POWER),
        "sqrt": lambda: (rf"\sqrt{{{_tex(args[0])}}}", ATOM),
        "outer": lambda: (
            rf"{_tex(args[0], PRODUCT)} \, {_tex(args[1], INDEXED)}^{{\intercal}}",
            PRODUCT,
        ),
        "inv": lambda: (rf"{_tex(args[0], INDEXED)}^{{-1}}", POWER),
        "eye": lambda: (rf"I_{{{_tex(args[0])}}}", INDEXED),
        "vstack": lambda: (_stack(args[0]), ATOM),
        "arange": lambda: (rf"0, \dots, {_tex(args[0])} - 1", SUM),
        "zeros": lambda: ("0", ATOM),
        "zeros_like": lambda: ("0", ATOM),
        "einsum": lambda: (_einsum(args), PRODUCT),
    }
    if name in special:
        return special[name]()
    if name == "tril" and len(args) == 2:
        return rf"\operatorname{{tril}}_{{{_tex(args[1])}}}\left({_tex(args[0])}\right)", ATOM
    if name not in _NAMED:
        raise NotMathematics(ast.unparse(node))
    inner = ", ".join(map(_tex, args))
    return rf"\operatorname{{{_NAMED[name]}}}\left({inner}\right)", ATOM


def _stack(rows: ast.expr) -> str:
    if not isinstance(rows, ast.List):
        raise NotMathematics(ast.unparse(rows))
    lines = r" \\ ".join(map(_tex, rows.elts))
    return rf"\begin{{bmatrix}} {lines} \end{{bmatrix}}"


_NAMED = {
    "cumsum": "cumsum",
    "diag": "diag",
    "abs": "abs",
    "tanh": "tanh",
    "log": "log",
    "tril": "tril",
    "maximum": "max",
    "where": "where",
    "eigvals": "eig",
    "eigvalsh": "eig",
}


def _einsum(args: list[ast.expr]) -> str:
    pattern, *arrays = args
    if not isinstance(pattern, ast.Constant):
        raise NotMathematics(ast.unparse(pattern))
    inputs, _, output = str(pattern.value).partition("->")
    summed = "".join(x for x in dict.fromkeys(inputs.replace(",", "")) if x not in output)
    terms = [
        _with_index(x, ", ".join(indices))
        for x, indices in zip(arrays, inputs.split(","), strict=True)
    ]
    return rf"\sum_{{{summed}}} {' '.join(terms)}"
