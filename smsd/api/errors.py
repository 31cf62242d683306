"""What the API refuses, and how: a status, a code for programs and a sentence for people.

Handlers raise `ApiError`; the wrapper in `endpoint.py` makes the answer of it. A sentence names the field, what it
got and what it takes, and says what to do next.
"""

from collections.abc import Sequence
from typing import Any

import orjson
from pydantic import ValidationError

SHOWN_CHARACTERS = 100


class ApiError(Exception):
    """Answered as `{"message", "code", "details", **extra}` with `status`; rolls the transaction back."""

    def __init__(
        self, status: int, code: str, message: str, details: object = None, **extra: object
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details
        self.extra = extra

    def body(self) -> bytes:
        """The answer's JSON."""
        answer = {"message": self.message, "code": self.code, "details": self.details}
        return orjson.dumps(answer | self.extra, default=str, option=orjson.OPT_UTC_Z)


def not_found(what: str) -> ApiError:
    """404 NOT_FOUND; `what` is like "campaign 12". Also for what belongs to another tenant."""
    return ApiError(404, "NOT_FOUND", f"{what} does not exist")


def invalid(field: str, value: object, takes: str) -> ApiError:
    """400 VALIDATION_ERROR for one field; `takes` completes "takes …"."""
    return _refusal([{"field": field, "value": shown(value), "takes": takes}])


def from_validation(error: ValidationError, known: Sequence[str]) -> ApiError:
    """400 VALIDATION_ERROR for all that pydantic found. `known`: the fields that the body or query has."""
    return _refusal([_detail(problem, known) for problem in error.errors(include_url=False)])


def shown(value: object) -> object:
    """A value as it may stand in an answer: itself if it is small, else the beginning of its JSON."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else shown(str(value))
    if isinstance(value, str):
        text = value
    elif isinstance(value, bytes):
        text = value.decode(errors="replace")
    else:
        try:
            text = orjson.dumps(value, default=str).decode()
        except TypeError:  # an integer beyond 64 bits, half a character
            text = repr(value)
    text = text.encode(errors="replace").decode()
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _refusal(details: list[dict[str, Any]]) -> ApiError:
    first = details[0]
    got = "nothing" if first["value"] is None else orjson.dumps(first["value"]).decode()
    message = f"{first['field']}: got {got}; takes {first['takes']}"
    if len(details) > 1:
        message += f" (and {len(details) - 1} more: see details)"
    return ApiError(400, "VALIDATION_ERROR", message, details)


def _detail(problem: Any, known: Sequence[str]) -> dict[str, Any]:
    field = ".".join(str(step) for step in problem["loc"]) or "body"
    value = problem["input"]
    match problem["type"]:
        case "missing":
            return {"field": field, "value": None, "takes": "a value: it is required"}
        case "extra_forbidden":
            taken = f"no such field; taken are {', '.join(known)}" if known else "nothing"
            return {"field": field, "value": shown(value), "takes": taken}
        case "json_invalid":
            why = str(problem["ctx"]["error"])
            return {"field": field, "value": shown(value), "takes": f"a JSON object: {why}"}
    takes = str(problem["msg"]).removeprefix("Value error, ")
    takes = takes.removeprefix("Input should be ").removeprefix("takes ")
    takes = "an object" if problem["type"] in ("model_type", "model_attributes_type") else takes
    return {"field": field, "value": shown(value), "takes": takes[:1].lower() + takes[1:]}
