"""What the source of a module's `forward` says about its children: which of them it calls on one and the same tensor.

Only where that is plain to see: a child is called once, in every run of `forward`, as `self.child(x)`, and nothing
assigns to the name x in between. What is not plain counts as unknown, and nothing here has to be right for a result to
be right: whoever uses it tests, at each call, that the tensors are in fact the same.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

# An expression inside one of these may not be evaluated, or more than once.
_CONDITIONAL = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Gated(NamedTuple):
    """Names of the children in down(activation(gate(x)) * up(x))."""

    gate: str
    up: str
    down: str
    activation: str


def plain_class(module: nn.Module) -> Any:
    """The class of a module before this library gave it a subclass with another forward."""
    return getattr(type(module), "_peft_kernels_plain", type(module))


@functools.cache
def shared_inputs(forward: Callable) -> tuple[tuple[str, ...], ...]:
    """Groups of children that `forward` calls on one tensor, in the order of the calls: for attention (("q_proj",
    "k_proj", "v_proj"),)."""
    function = _parsed(forward)
    if function is None:
        return ()
    self = _self(function)
    mentions = Counter(_child(node, self) for node in ast.walk(function))
    groups: dict[tuple, list[str]] = {}
    assigned: Counter[str] = Counter()
    for statement in _always_run(function.body):
        for call in _always_evaluated(statement):
            name, argument = _called_child(call, self)
            if name is not None and mentions[name] == 1:
                groups.setdefault((argument, assigned[argument], assigned[""]), []).append(name)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                assigned[node.id] += 1
            if isinstance(node, (ast.Return, ast.Yield, ast.Await)):
                assigned[""] += 1  # what comes later may not be reached
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


@functools.cache
def gated_mlp(forward: Callable) -> Gated | None:
    """The roles of the children when all that `forward(self, x)` does is return down(activation(gate(x)) * up(x))."""
    function = _parsed(forward)
    if function is None or len(function.args.args) != 2 or function.args.vararg or function.args.kwarg:
        return None
    self, x = (argument.arg for argument in function.args.args)
    body = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    inline = _Inline()
    for statement in body[:-1]:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                inline.values[name] = inline.visit(value)
            case _:
                return None
    if not body or not isinstance(body[-1], ast.Return) or body[-1].value is None:
        return None
    value = inline.visit(body[-1].value)
    return None if inline.values else _gated(value, self, x)


class _Inline(ast.NodeTransformer):
    """Puts the values of names in the names' places, each once: a second use keeps the name, and so does not match."""

    def __init__(self) -> None:
        self.values: dict[str, ast.expr] = {}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.values.pop(node.id, node)


def _gated(value: ast.AST | None, self: str, x: str) -> Gated | None:
    down, product = _call_on_self(value, self)
    if not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
        return None
    for left, right in ((product.left, product.right), (product.right, product.left)):
        activation, gated = _call_on_self(left, self)
        gate, gate_input = _call_on_self(gated, self)
        up, up_input = _call_on_self(right, self)
        inputs = (gate_input, up_input)
        if activation and gate and up and down and all(isinstance(i, ast.Name) and i.id == x for i in inputs):
            roles = Gated(gate, up, down, activation)
            return roles if len(set(roles)) == 4 else None
    return None


def _call_on_self(node: ast.AST | None, self: str) -> tuple[str | None, ast.AST | None]:
    """(child, its only argument) of `self.child(argument)`."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        return _child(node.func, self), node.args[0]
    return None, None


def _called_child(node: ast.AST, self: str) -> tuple[str | None, str]:
    """(child, name) of `self.child(name)`."""
    child, argument = _call_on_self(node, self)
    return (child, argument.id) if isinstance(argument, ast.Name) else (None, "")


def _child(node: ast.AST, self: str) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self:
        return node.attr
    return None


def _parsed(forward: Callable) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):  # made at run time, or by C
        return None
    function = tree.body[0] if len(tree.body) == 1 else None
    return function if isinstance(function, ast.FunctionDef) and function.args.args else None


def _self(function: ast.FunctionDef) -> str:
    return function.args.args[0].arg


def _always_run(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a function in order, with the insides of `with` blocks in place."""
    for statement in body:
        if isinstance(statement, ast.With):
            yield from _always_run(statement.body)
        else:
            yield statement


def _always_evaluated(statement: ast.stmt) -> Iterator[ast.Call]:
    """The calls in a statement that happen whenever it runs; none for statements that hold others."""
    if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Expr, ast.Return)):
        return
    yield from _calls(statement)


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """In the order in which they are evaluated."""
    if isinstance(node, _CONDITIONAL):
        return
    for child in ast.iter_child_nodes(node):
        yield from _calls(child)
    if isinstance(node, ast.Call):
        yield node
