"""The OpenAPI 3.1 document, made of the route table and the models: JSON Schema is what pydantic speaks anyway."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import orjson
from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

import smsd
from smsd.api.endpoint import Endpoint, Model

DOCUMENT = web.AppKey("openapi", bytes)

_SECURITY: dict[str, list[dict[str, list[str]]]] = {
    "tenant": [{"tenantKey": []}],
    "admin": [{"adminToken": []}],
    "public": [],
}
_SCHEMES = {
    "tenantKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "A tenant's key (`sk_…`); it sees that tenant alone.",
    },
    "adminToken": {
        "type": "http",
        "scheme": "bearer",
        "description": "The value of `SMSD_ADMIN_TOKEN`.",
    },
}
_References = dict[tuple[Any, JsonSchemaMode], dict[str, Any]]

_ERROR = {
    "type": "object",
    "required": ["message", "code", "details"],
    "properties": {
        "message": {"type": "string", "description": "For people: what is wrong, what to do"},
        "code": {"type": "string", "pattern": "^[A-Z0-9_]+$", "description": "For programs"},
        "details": {"description": "For VALIDATION_ERROR a list of {field, value, takes}"},
    },
    "examples": [
        {
            "message": "requestsPerSecond: got 0; takes greater than or equal to 1",
            "code": "VALIDATION_ERROR",
            "details": [
                {"field": "requestsPerSecond", "value": 0, "takes": "greater than or equal to 1"}
            ],
        }
    ],
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same key and body get the same answer, for 24 hours at least.",
    "schema": {"type": "string", "pattern": "^[!-~]+$", "minLength": 1, "maxLength": 255},
}


def encode(endpoints: Sequence[Endpoint]) -> bytes:
    """The document as JSON."""
    return orjson.dumps(document(endpoints))


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The document of these endpoints."""
    schemas, references = _schemas(endpoints)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        operation = _operation(endpoint, references)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "smsd",
            "version": smsd.__version__,
            "description": "Bulk SMS campaigns through Mitto's HTTP API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "tags": [{"name": tag} for tag in sorted({_tag(endpoint) for endpoint in endpoints})],
        "components": {
            "schemas": {**schemas, "Error": _ERROR},
            "securitySchemes": _SCHEMES,
        },
    }


def _schemas(endpoints: Iterable[Endpoint]) -> tuple[dict[str, Any], _References]:
    wanted: dict[tuple[type[BaseModel], JsonSchemaMode], None] = {}
    for endpoint in endpoints:
        if endpoint.body is not None:
            wanted[endpoint.body, "validation"] = None
        if endpoint.answer is not None:
            wanted[endpoint.answer, "serialization"] = None
    references, definitions = models_json_schema(
        list(wanted), ref_template="#/components/schemas/{model}"
    )
    schemas = {name: _tidy(schema) for name, schema in definitions.get("$defs", {}).items()}
    return schemas, dict(references)


def _tidy(schema: Any) -> Any:
    """Without titles that repeat a field's name, and without defaults that say nothing."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if (key == "title" and isinstance(value, str)) or (key == "default" and value is None):
            continue
        if key in ("properties", "$defs"):
            kept[key] = {name: _tidy(inner) for name, inner in value.items()}
        else:
            kept[key] = value if key in ("examples", "default", "enum") else _tidy(value)
    return kept


def _operation(endpoint: Endpoint, references: _References) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(endpoint),
        "summary": endpoint.summary,
        "tags": [_tag(endpoint)],
        "security": _SECURITY[endpoint.auth],
        "parameters": _parameters(endpoint),
        "responses": _responses(endpoint, references),
    }
    if endpoint.body is not None:
        schema = references[endpoint.body, "validation"]
        required = any(info.is_required() for info in endpoint.body.model_fields.values())
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": required, "content": content}
    elif endpoint.raw_body:
        operation["requestBody"] = {"content": {"*/*": {}}}
    return operation


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    found = []
    for name in endpoint.parameters:
        number = {"type": "integer", "format": "int64", "minimum": 1, "maximum": 2**63 - 1}
        schema = number if name in endpoint.numbers else {"type": "string", "minLength": 1}
        found.append({"name": name, "in": "path", "required": True, "schema": schema})
    if endpoint.query is not None:
        found += _query_parameters(endpoint.query)
    return [*found, _IDEMPOTENCY_KEY] if endpoint.idempotent else found


def _query_parameters(model: type[Model]) -> list[dict[str, Any]]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    found = []
    for name, field in schema["properties"].items():
        description = field.pop("description", None)
        parameter = {"name": name, "in": "query", "schema": _no_null(_tidy(field))}
        parameter["required"] = name in schema.get("required", ())
        found.append(parameter | ({"description": description} if description else {}))
    return found


def _no_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A query cannot say null: leaving a parameter out does."""
    choices = [choice for choice in schema.pop("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1:
        return {**schema, **choices[0]}
    return {**schema, "anyOf": choices} if choices else schema


def _responses(endpoint: Endpoint, references: _References) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "Done"}
    if endpoint.answer is not None:
        schema = references[endpoint.answer, "serialization"]
        success["content"] = {"application/json": {"schema": schema}}
    elif endpoint.status != 204:
        success["content"] = {endpoint.media_type: {}}
    codes: dict[int, list[str]] = {}
    for status, code in (*_common_errors(endpoint), *endpoint.errors):
        if code not in codes.setdefault(status, []):
            codes[status].append(code)
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": "#/components/schemas/Error"}}
    }
    content.setdefault(endpoint.media_type, {})
    refusals = {
        str(status): {"description": ", ".join(names), "content": content}
        for status, names in sorted(codes.items())
    }
    return {str(endpoint.status): success, **refusals}


def _common_errors(endpoint: Endpoint) -> list[tuple[int, str]]:
    errors = []
    if endpoint.body or endpoint.query or endpoint.idempotent:
        errors.append((400, "VALIDATION_ERROR"))
    if endpoint.auth != "public":
        errors.append((401, "UNAUTHORIZED"))
    if endpoint.auth == "admin":
        errors.append((403, "ADMIN_DISABLED"))
    if endpoint.parameters:
        errors.append((404, "NOT_FOUND"))
    if endpoint.method != "GET":
        errors.append((400, "BAD_REQUEST"))
    if endpoint.method != "GET" and not endpoint.raw_body:
        errors.append((413, "PAYLOAD_TOO_LARGE"))
    if endpoint.idempotent:
        errors.append((422, "IDEMPOTENCY_MISMATCH"))
    return [*errors, (503, "QUEUE_UNAVAILABLE"), (503, "INTERNAL")]


def _operation_id(endpoint: Endpoint) -> str:
    """`POST /api/campaigns/{id}/enqueue` → `postCampaignsByIdEnqueue`."""
    path = re.sub(r"\{(\w+)\}", r"by-\1", endpoint.path.removeprefix("/api"))
    words = re.findall(r"[A-Za-z0-9]+", path)
    return endpoint.method.lower() + "".join(word[0].upper() + word[1:] for word in words)


def _tag(endpoint: Endpoint) -> str:
    first = endpoint.path.removeprefix("/api").strip("/").split("/")[0]
    return (
        first
        if endpoint.path.startswith("/api")
        else {"webhooks": "webhooks", "u": "public", "o": "public"}.get(first, "system")
    )
