"""JSON answers."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from convener.gateway.jsontext import dumps


class Json(Response):
    """An answer encoded as it is: what we build ourselves is not validated again."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200) -> None:
        super().__init__(dumps(content), status_code)
