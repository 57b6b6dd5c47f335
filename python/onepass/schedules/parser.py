"""Parse schedules from text."""

from __future__ import annotations

import ast
import inspect
import operator
import warnings
from collections.abc import Callable
from typing import Any

from . import parts
from .schedule import Schedule

# All but the base class, and but functions, which text cannot hold.
_PARTS: dict[str, Callable[..., Schedule]] = {
    name: getattr(parts, name) for name in parts.__all__ if name not in ("Schedule", "function")
}

_METHODS = ("clamp", "repeat", "scale", "shift", "take")


def parse(text: str) -> Schedule:
    """Parse a schedule from text, such as ``(warmup(500) >> cosine(10_000, end=0.1)).repeat(3)``.

    The text is never executed as Python. Allowed are: all parts of ``onepass.schedules`` except :class:`function`,
    with numbers as arguments (for milestones, a list of numbers), positional or named; ``>>``; parentheses; and the
    methods clamp, repeat, scale, shift and take.

    Args:
        text: The text, as ``repr`` of a schedule returns it; line breaks and spaces have no effect.

    Returns:
        The schedule.

    Raises:
        ValueError: The text is not a schedule. The message shows the position and the allowed names.
        TypeError: ``text`` is not a string.

    Example:
        >>> from onepass.schedules import cosine, parse, warmup
        >>> parse("warmup(500) >> cosine(10_000, end=0.1)") == warmup(500) >> cosine(10_000, end=0.1)
        True
    """
    return _Reader(text).read()


class _Reader:
    """Build a schedule from the syntax tree of a text; raise for each node that is not in the whitelist."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {text!r}")
        self._text = " ".join(text.split())  # one line, so that an error can mark a position

    def read(self) -> Schedule:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SyntaxWarnings of ast.parse, such as for 1if
                tree = ast.parse(self._text, mode="eval")
            return self._schedule(tree.body)
        except SyntaxError as error:
            raise self._refused((error.offset or 1) - 1, f"this is not a schedule ({error.msg})") from None
        except (RecursionError, MemoryError):
            raise self._refused(0, "the schedule is nested too deeply") from None

    def _refused(self, column: int, why: str) -> ValueError:
        return ValueError(f"at position {column + 1}, {why}\n    {self._text}\n    {' ' * column}^")

    def _refused_at(self, node: ast.expr | ast.keyword, why: str) -> ValueError:
        return self._refused(self._column(node.col_offset), why)

    def _column(self, offset: int) -> int:
        return len(self._text.encode()[:offset].decode())  # ast offsets count UTF-8 bytes

    def _schedule(self, node: ast.expr) -> Schedule:
        match node:
            case ast.BinOp(left=left, op=ast.RShift(), right=right):
                return self._made(left.col_offset, operator.rshift, self._schedule(left), self._schedule(right))
            case ast.Call(func=ast.Name(id=name)) if name in _PARTS:
                return self._call(node, node.col_offset, name, _PARTS[name])
            case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in _METHODS:
                method = getattr(self._schedule(value), name)
                return self._call(node, value.end_col_offset or 0, f".{name}", method)
            case ast.Call(func=ast.Attribute(value=value, attr=name)):
                column = self._column(value.end_col_offset or 0)
                raise self._refused(column, f"there is no method .{name}; known are {', '.join(_METHODS)}")
            case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name) if name not in _PARTS:
                raise self._refused_at(node, f"there is no part {name!r}; known are {', '.join(_PARTS)}")
            case ast.Name(id=name):
                arguments = ", ".join(inspect.signature(_PARTS[name]).parameters)
                raise self._refused_at(node, f"{name} needs arguments: {name}({arguments})")
        raise self._refused_at(
            node, "expected a schedule: a part with its arguments, such as cosine(100), or several parts joined by >>"
        )

    def _call(self, node: ast.Call, offset: int, name: str, make: Callable[..., Schedule]) -> Schedule:
        args = [self._value(arg) for arg in node.args]
        kwargs: dict[str, Any] = {}
        known = inspect.signature(make)
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg not in known.parameters:
                raise self._refused_at(
                    keyword, f"{name} has no argument {keyword.arg or '**'}; known are {', '.join(known.parameters)}"
                )
            if keyword.arg in kwargs:
                raise self._refused_at(keyword, f"{name}: {keyword.arg} is given twice")
            kwargs[keyword.arg] = self._value(keyword.value)
        return self._made(offset, make, *args, **kwargs)

    def _made(self, offset: int, make: Callable[..., Schedule], *args: Any, **kwargs: Any) -> Schedule:
        try:
            inspect.signature(make).bind(*args, **kwargs)  # its message is clearer than that of the call
            return make(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise self._refused(self._column(offset), str(error)) from None

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() as number) if _is_number(number):
                return number
            case ast.Constant(value=None):
                return None
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)) if _is_number(
                number
            ):
                return -number
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return tuple(self._value(element) for element in elements)
        raise self._refused_at(node, "expected a number")


def _is_number(value: int | float) -> bool:
    return not isinstance(value, bool)
