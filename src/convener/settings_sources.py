"""Where settings come from: ``CONVENER_*`` variables, the files that they name, and ``convener.toml``.

pydantic-settings ignores a variable that it does not know, so that a misspelt ``CONVENER_REDIS_ULR`` would
start a standalone node in production. The sources here refuse what they cannot place, and say what was meant.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from convener.errors import ConfigurationError

PREFIX: Final = "CONVENER_"
TOML_FILE: Final = "convener.toml"

# Read by the commands that talk to a node, not by the node: allowed here so that one shell can run both.
CLIENT_VARIABLES: Final = frozenset({"CONVENER_URL", "CONVENER_TOKEN"})

# Kubernetes puts the address of every service of the namespace into every container: one that is called
# `convener` or `convener-redis` sets variables with our prefix, CONVENER_PORT=tcp://10.0.0.7:8000 among them.
_SERVICE_LINK_NAME: Final = re.compile(
    r"CONVENER(_[A-Z0-9_]+)?_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_LINK_PORT: Final = re.compile(r"CONVENER(_[A-Z0-9_]+)?_PORT")
_SERVICE_LINK_VALUE: Final = re.compile(r"(tcp|udp|sctp)://")


def is_service_link(name: str, value: str) -> bool:
    """Whether the variable is one of those that Kubernetes injects for a service called ``convener…``."""
    if _SERVICE_LINK_NAME.fullmatch(name):
        return True
    return bool(_SERVICE_LINK_PORT.fullmatch(name) and _SERVICE_LINK_VALUE.match(value))


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for a name close to a known one, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def read_environment(environ: Mapping[str, str], fields: Iterable[str], secrets: Iterable[str]) -> dict[str, str]:
    """The settings in `environ`, by field name, as the strings that they are.

    Args:
        environ: all variables; those without the prefix ``CONVENER_`` are not looked at. An empty one
            counts as not set, as compose files write ``CONVENER_X=`` for that.
        fields: names of the settings that may be given as text.
        secrets: those of them that may also stand in a file, named by ``CONVENER_<FIELD>_FILE``.

    Raises:
        ConfigurationError: an unknown variable, a field given twice, or a file that cannot be read.
    """
    by_variable = {PREFIX + field.upper(): field for field in fields}
    by_file_variable = {f"{PREFIX}{field.upper()}_FILE": field for field in secrets}
    values: dict[str, str] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(PREFIX) or variable in CLIENT_VARIABLES or is_service_link(variable, text):
            continue
        field = by_variable.get(variable)
        file_field = by_file_variable.get(variable)
        if field is None and file_field is None:
            hint = suggestion(variable, [*by_variable, *by_file_variable])
            raise ConfigurationError(f"unknown environment variable {variable}{hint}")
        if not text:
            continue
        if file_field is not None:
            if file_field in values:
                raise ConfigurationError(f"{file_field}: set twice, by {PREFIX}{file_field.upper()} and {variable}")
            values[file_field] = _read_secret(variable, text)
        elif field is not None:
            values[field] = text
    return values


def _read_secret(variable: str, path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigurationError(f"{variable}: cannot read {path}: {reason}") from error
    # Editors and `kubectl create secret` end files with a newline, which is no part of any secret.
    return text.rstrip("\r\n")


def read_toml(path: Path, fields: Iterable[str]) -> dict[str, Any]:
    """The settings in the TOML file at `path`, by field name; nothing if there is no file.

    Raises:
        ConfigurationError: not readable, not TOML, or a key that is no setting.
    """
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigurationError(f"{path.name}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path.name}: not valid TOML: {error}") from error
    known = sorted(fields)
    for key, value in values.items():
        if key not in known:
            raise ConfigurationError(f"{path.name}: unknown setting {key}{suggestion(key, known)}")
        if isinstance(value, dict):
            # pydantic-settings merges tables of several sources key by key. A table given in Python must
            # replace the file's: a token that was left out of it must not come back from the file.
            values[key] = tuple(cast("dict[str, object]", value).items())
    return values


class _MappingSource(PydanticBaseSettingsSource):
    """A source that has all its values at once."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self().get(field_name), field_name, False


class EnvironmentSource(_MappingSource):
    """``CONVENER_*`` variables of this process."""

    def __init__(self, settings_cls: type[BaseSettings], fields: Iterable[str], secrets: Iterable[str]) -> None:
        super().__init__(settings_cls)
        self._fields = tuple(fields)
        self._secrets = tuple(secrets)

    def __call__(self) -> dict[str, Any]:
        return dict(read_environment(os.environ, self._fields, self._secrets))


class TomlSource(_MappingSource):
    """``convener.toml`` in the working directory."""

    def __init__(self, settings_cls: type[BaseSettings], fields: Iterable[str]) -> None:
        super().__init__(settings_cls)
        self._fields = tuple(fields)

    def __call__(self) -> dict[str, Any]:
        return read_toml(Path(TOML_FILE), self._fields)
