"""Transitions with a guard cut out.

Every condition, bound, effect and field of the functions is a potential guard. Each mutant changes one of them; the
new code is put into the living function object, so that every caller sees it, and taken out again.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType

Change = Callable[[ast.AST], ast.AST | None]

_BOUNDS: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True)
class Mutant:
    """One change of one function of a module, as new code of that function."""

    module: ModuleType
    function: str
    label: str
    code: CodeType

    @contextmanager
    def alive(self) -> Generator[None, None, None]:
        """The function behaves as changed."""
        target = _living(self.module, self.function)
        original = target.__code__
        target.__code__ = self.code
        try:
            yield
        finally:
            target.__code__ = original


def mutants(module: ModuleType) -> Iterator[Mutant]:
    """All mutants of all functions that `module` defines."""
    tree = ast.parse(inspect.getsource(module))
    for name, function in _functions(tree):
        count = len(list(ast.walk(function)))
        seen: dict[str, int] = {}
        for index in range(count):
            for label, change in _changes(list(ast.walk(function))[index]):
                code = _compiled(tree, module, name, index, change)
                seen[label] = seen.get(label, 0) + 1
                suffix = f" #{seen[label]}" if seen[label] > 1 else ""
                yield Mutant(module, name, f"{name}: {label}{suffix}", code)


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def _living(module: ModuleType, name: str) -> FunctionType:
    target: object = module
    for part in name.split("."):
        target = inspect.getattr_static(target, part)
    if isinstance(target, staticmethod):
        target = target.__func__
    assert isinstance(target, FunctionType)
    return target


def _changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """What can be cut out at a node: a label, and a function that changes a copy of the node."""
    if isinstance(node, ast.BoolOp):
        for i, part in enumerate(node.values):
            yield f"without `{ast.unparse(part)}`", _without("values", i)
    if isinstance(node, ast.If | ast.IfExp):
        for value in (False, True):
            yield f"`{ast.unparse(node.test)}` always {value}", _replaced("test", ast.Constant(value))
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in _BOUNDS:
                yield f"`{ast.unparse(node)}` with the bound moved", _bound(i)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in {"max", "min"} and len(node.args) > 1:
            for i, part in enumerate(node.args):
                yield f"`{ast.unparse(node)}` without `{ast.unparse(part)}`", _without("args", i)
        if node.func.id == "replace":
            for i, keyword in enumerate(node.keywords):
                yield f"without the change of `{keyword.arg}`", _without("keywords", i)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        yield f"`{ast.unparse(node)}` without `{ast.unparse(node.right)}`", lambda n: getattr(n, "left")  # noqa: B009
    if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load):
        for i, part in enumerate(node.elts):
            if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id[0].isupper():
                yield f"without the effect `{part.func.id}`", _without("elts", i)
    if isinstance(node, ast.comprehension):
        for i, part in enumerate(node.ifs):
            yield f"without the filter `{ast.unparse(part)}`", _without("ifs", i)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield f"without `{ast.unparse(node)}`", lambda n: ast.copy_location(ast.Pass(), n)


def _without(name: str, index: int) -> Change:
    def change(node: ast.AST) -> ast.AST:
        parts = getattr(node, name)
        del parts[index]
        return parts[0] if name == "values" and len(parts) == 1 else node

    return change


def _replaced(name: str, value: ast.expr) -> Change:
    def change(node: ast.AST) -> ast.AST:
        setattr(node, name, ast.copy_location(value, getattr(node, name)))
        return node

    return change


def _bound(index: int) -> Change:
    def change(node: ast.AST) -> ast.AST:
        assert isinstance(node, ast.Compare)
        node.ops[index] = _BOUNDS[type(node.ops[index])]()
        return node

    return change


class _At(ast.NodeTransformer):
    """Changes one node, found by identity."""

    def __init__(self, node: ast.AST, change: Change) -> None:
        self._node = node
        self._change = change

    def visit(self, node: ast.AST) -> ast.AST | None:
        return self._change(node) if node is self._node else self.generic_visit(node)


def _compiled(tree: ast.Module, module: ModuleType, name: str, index: int, change: Change) -> CodeType:
    """Code of the function `name` with its node number `index` changed."""
    changed = copy.deepcopy(tree)
    function = dict(_functions(changed))[name]
    _At(list(ast.walk(function))[index], change).visit(changed)
    ast.fix_missing_locations(changed)
    assert module.__file__ is not None
    return _find(compile(changed, module.__file__, "exec"), name)


def _find(code: CodeType, name: str) -> CodeType:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_qualname == name:
                return inner
            if name.startswith(f"{inner.co_qualname}."):
                return _find(inner, name)
    raise AssertionError(f"no code of {name}")
