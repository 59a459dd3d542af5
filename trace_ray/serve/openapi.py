"""The endpoint's OpenAPI document: its paths, with the bodies that vLLM's own types describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from trace_ray.config.serve import Mode
from trace_ray.serve.calls import REQUEST_ID
from trace_ray.serve.engines import Engines
from trace_ray.serve.requests import COMPLIANCE_FIELD, MODE_HEADER
from trace_ray.types import ROLES

Schema = dict[str, Any]
PREFIX = "#/components/schemas/"
described = APIRouter()

_TEXT: Schema = {"type": "string"}
_MODE: Schema = {"type": "string", "enum": list(get_args(Mode))}
_MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"type": "string", "enum": list(ROLES)}, "content": _TEXT},
    },
}


def _object(required: str, **properties: Schema) -> Schema:
    return {"type": "object", "required": required.split(), "properties": properties}


_OURS: dict[str, Schema] = {
    "ComplianceCheckRequest": _object(
        "model response", model=_TEXT, messages=_MESSAGES, prompt=_TEXT, response=_TEXT
    )
    | {"oneOf": [{"required": ["messages"]}, {"required": ["prompt"]}]},
    "ComplianceCheckResponse": _object(
        "model policy label clause p_violate judge latency_s",
        model=_TEXT,
        policy=_TEXT,
        label=_TEXT,
        clause={"type": ["string", "null"]},
        p_violate={"type": ["number", "null"], "minimum": 0, "maximum": 1},
        judge=_TEXT,
        latency_s={"type": "number", "minimum": 0},
        shadow={"type": "object"},
    ),
    "ComplianceEditRequest": _object(
        "model request_id response",
        model=_TEXT,
        request_id=_TEXT | {"pattern": f"^{REQUEST_ID}$"},
        response=_TEXT | {"pattern": r"\S"},
        index={"type": "integer", "default": 0},
    ),
    "ComplianceEditResponse": _object("recorded", recorded={"type": "boolean"}),
    "Error": _object(
        "error",
        error=_object(
            "message type param code",
            message=_TEXT,
            type=_TEXT,
            param={"type": ["string", "null"]},
            code={"type": "integer"},
        ),
    ),
}
_BODIES = {
    "/v1/chat/completions": ("ChatCompletionRequest", "ChatCompletionResponse"),
    "/v1/completions": ("CompletionRequest", "CompletionResponse"),
    "/v1/compliance/check": ("ComplianceCheckRequest", "ComplianceCheckResponse"),
    "/v1/compliance/edits": ("ComplianceEditRequest", "ComplianceEditResponse"),
}
"""Path -> what it takes and gives."""
_GENERATES = ("/v1/chat/completions", "/v1/completions")
_HEALTH = ("/healthz", "/readyz")
"""Paths that ask for no key, and give no error."""


def document(paths: Mapping[str, Any], engine: Mapping[str, Schema]) -> dict[str, Any]:
    """Return the whole document.

    Args:
        paths: FastAPI's document, which knows the paths but no bodies.
        engine: vLLM's schemas of ``_BODIES``, with what they refer to, by name.
    """
    schemas = {**engine, **_OURS}
    for path in _GENERATES:
        name, _ = _BODIES[path]
        schemas[name] = _with_ours(engine[name])
    operations = {
        path: {method: _described(path, operation) for method, operation in methods.items()}
        for path, methods in paths["paths"].items()
    }
    bearer = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        **paths,
        "paths": operations,
        "components": {"schemas": schemas, "securitySchemes": bearer},
    }


def _with_ours(schema: Schema) -> Schema:
    properties = schema["properties"] | {"model": _TEXT, COMPLIANCE_FIELD: _MODE}
    return schema | {
        "properties": properties,
        "required": sorted({*schema.get("required", ()), "model"}),
    }


def _described(path: str, operation: Mapping[str, Any]) -> dict[str, Any]:
    ok = operation["responses"]["200"]
    if path in _HEALTH:
        return {**operation, "responses": {"200": ok, "503": ok | {"description": "not now"}}}
    parts: dict[str, Any] = {"security": [{"bearer": []}, {}]}
    if path in _BODIES:
        takes, gives = _BODIES[path]
        parts["requestBody"] = {"required": True, "content": _json(takes)}
        ok = {"description": "the answer", "content": _json(gives)}
    if path in _GENERATES:
        ok["content"]["text/event-stream"] = {}
        parts["parameters"] = [{"name": MODE_HEADER, "in": "header", "schema": _MODE}]
    error = {"description": "the error, in OpenAI's form", "content": _json("Error")}
    return {**operation, **parts, "responses": {"200": ok, "4XX": error, "5XX": error}}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": PREFIX + schema}}}


class DescribedRoute:
    """The document's own route, for an ingress that has engines."""

    _engines: Engines
    _document: bytes = b""
    """As it is sent; empty = nobody has asked yet. It stays as it is while the process lives."""

    @described.get("/openapi.json", include_in_schema=False)
    async def openapi(self, request: Request) -> Response:
        """Send the document; it names no model, so that no key is asked for."""
        if not self._document:
            schemas = await self._engines.schemas(PREFIX + "{model}")
            self._document = bytes(JSONResponse(document(request.app.openapi(), schemas)).body)
        return Response(self._document, media_type="application/json")
