"""Finding the ASGI application that ``module:attribute`` names."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, cast

from convener.cli.failures import CommandFailed
from convener.errors import ConvenerError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

DEFAULT_APPLICATION = "convener.demo:app"


def load_application(target: str) -> Application:
    """Import ``module:attribute``, the working directory first on the path.

    Raises:
        CommandFailed: malformed (exit code 2), or there is no such module, attribute or application.
        ConvenerError: raised by the module itself.
    """
    module_name, separator, attribute = target.partition(":")
    if not separator or not module_name or not attribute:
        raise CommandFailed(f"{target!r} names no application: write module:attribute, as in main:app", 2)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    value: object = _import(module_name)
    for name in attribute.split("."):
        try:
            value = getattr(value, name)
        except AttributeError:
            raise CommandFailed(f"module {module_name} has no attribute {attribute}") from None
    if not _is_application(value):
        raise CommandFailed(f"{target} is no ASGI application but {type(value).__name__}")
    return cast("Application", value)


def _import(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise CommandFailed(f"no module named {error.name} in {Path.cwd()} or installed") from error
        raise CommandFailed(f"{name} cannot be imported: {error}{_place(error)}") from error
    except ConvenerError:
        raise
    except Exception as error:
        raise CommandFailed(f"{name} cannot be imported: {_line(error)}{_place(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _place(error: Exception) -> str:
    """`` (file, line)`` of the innermost frame in a file: where the user has to look."""
    if isinstance(error, SyntaxError):
        return ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith("<"):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def _is_application(value: object) -> bool:
    """Whether it can be called with scope, receive and send; a class or an ASGI 2 application cannot."""
    if inspect.isclass(value) or not callable(value):
        return False
    try:
        inspect.signature(value).bind({}, None, None)
    except (TypeError, ValueError):
        return False
    return True
