"""The ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import lowbit
from lowbit.engine.async_engine import AsyncOmni
from lowbit.engine.omni import Omni
from lowbit.serving import chat, images
from lowbit.serving.errors import ApiError, as_api_error, unavailable
from lowbit.serving.gate import Gate
from lowbit.serving.metrics import CONTENT_TYPE, Metrics
from lowbit.serving.pictures import MEDIA_TYPES
from lowbit.serving.schemas import (
    ChatRequest,
    EditRequest,
    ErrorAnswer,
    ImageRequest,
    ImagesAnswer,
    Model,
    Models,
)
from lowbit.serving.service import Service, check_settings, request_id
from lowbit.serving.settings import ServerSettings

Handler = Callable[[Service, Request], Awaitable[Response]]

# Path -> the handler, its request, its answer and what it does.
POSTS: Mapping[str, tuple[Handler, type[BaseModel], type[BaseModel] | None, str]] = {
    "/v1/images/generations": (images.generations, ImageRequest, ImagesAnswer, "Make pictures from a prompt"),
    "/v1/images/edits": (images.edits, EditRequest, ImagesAnswer, "Make pictures from a prompt and pictures"),
    "/v1/chat/completions": (chat.completions, ChatRequest, None, "Make a picture as a chat's answer"),
}

# Paths of OpenAI's and vLLM-Omni's that are not served, and why.
NOT_SERVED: Mapping[str, str] = {
    "/v1/images/variations": "use /v1/images/edits with a model that edits",
    "/v1/audio/speech": "speech models are not supported",
    "/v1/audio/speech/batch": "speech models are not supported",
    "/v1/audio/generate": "audio models are not supported",
    "/v1/audio/voices": "speech models are not supported",
    "/v1/audio/transcriptions": "speech models are not supported",
    "/v1/audio/translations": "speech models are not supported",
    "/v1/videos": "video jobs are not supported yet: lowbit.Omni makes videos in Python",
    "/v1/videos/sync": "video jobs are not supported yet: lowbit.Omni makes videos in Python",
    "/v1/completions": "a diffusion model completes no text: use /v1/images/generations",
    "/v1/chat/completions/batch": "send the requests one by one: they advance together",
    "/v1/responses": "use /v1/chat/completions or /v1/images/generations",
    "/v1/embeddings": "a diffusion model has no embeddings of text",
}

_STATUSES = (400, 401, 404, 405, 413, 429, 500, 503, 504)


def create_app(omni: Omni | AsyncOmni, settings: ServerSettings | None = None) -> FastAPI:
    """Return an ASGI application that serves a model.

    Args:
        omni: the model; the application's engine thread owns it from now on.
        settings: how to serve; ``None`` serves without a key, under the model's own name.

    Raises:
        ConfigError: settings that the model can't honour.
    """
    config = omni.config if isinstance(omni, Omni) else omni.omni.config
    settings = settings or ServerSettings(model_names=(config.model or "embedded",))
    check_settings(omni if isinstance(omni, Omni) else omni.omni, settings)
    quantization = config.quantization
    metrics = Metrics(settings.model_names[0], quantization.get_name() if quantization else "none")
    if isinstance(omni, Omni):
        omni = AsyncOmni(
            omni,
            max_running=settings.max_running,
            max_queue=settings.max_queue,
            max_batch=settings.max_batch,
            observer=metrics,
        )
    metrics.watch(omni.engine)
    service = Service(omni, settings, metrics)
    app = FastAPI(
        title="lowbit",
        version=lowbit.__version__,
        description=f"Serves {settings.model_names[0]} with OpenAI's API.",
        root_path=settings.root_path,
        redirect_slashes=False,
    )
    app.state.service = service
    _add_errors(app, service)
    _add_posts(app, service)
    _add_gets(app, service)
    _add_refusals(app)
    _describe(app)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add_errors(app: FastAPI, service: Service) -> None:
    async def answer(http: Request, error: Exception) -> Response:
        refusal = as_api_error(_of_http(error), request_id(http))
        service.metrics.errors.labels(refusal.code or "").inc()
        return refusal.response()

    for kind in (ApiError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer)


def _of_http(error: Exception) -> Exception:
    """Return starlette's and FastAPI's own errors as the API's."""
    if isinstance(error, RequestValidationError):
        return ApiError(400, f"The request is not valid: {error.errors()[0].get('msg')}")
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        text = {404: "There is no such path", 405: "The path does not take this method"}.get(error.status_code)
        return ApiError(error.status_code, text or str(error.detail), None, code, headers=error.headers or {})
    return error


def _add_posts(app: FastAPI, service: Service) -> None:
    for path, (handler, request, answer, summary) in POSTS.items():
        media = "multipart/form-data" if request is EditRequest else "application/json"
        schema = {"$ref": f"#/components/schemas/{request.__name__}"}
        app.add_api_route(
            path,
            _endpoint(service, handler),
            methods=["POST"],
            summary=summary,
            response_model=None,
            responses=_responses(answer),
            openapi_extra={"requestBody": {"required": True, "content": {media: {"schema": schema}}}},
        )


def _endpoint(service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(http: Request) -> Response:
        if service.omni.engine.is_closing or not service.is_alive:
            raise unavailable("The server is shutting down", "shutting_down")
        return await handler(service, http)

    endpoint.__name__ = handler.__name__
    return endpoint


def _responses(answer: type[BaseModel] | None) -> dict[int | str, dict[str, Any]]:
    """Describe the answers of a POST: pictures as data, as events, and, where ``answer`` holds them, as files."""
    files = (*MEDIA_TYPES.values(), "application/zip") if answer is not None else ()
    found = _errors(*_STATUSES)
    found[200] = _content("text/event-stream", *files) | ({"model": answer} if answer is not None else {})
    if answer is None:
        found[200]["content"]["application/json"] = {}
    return found


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer} for status in statuses}


def _content(*media_types: str) -> dict[str, Any]:
    return {"content": {media_type: {"schema": {"type": "string"}} for media_type in media_types}}


def _add_gets(app: FastAPI, service: Service) -> None:
    def models() -> Models:
        names = service.settings.model_names
        return Models(data=[Model(id=name, created=service.created) for name in names])

    def model(name: str) -> Model:
        service.check_model(name)
        return Model(id=name, created=service.created)

    def health() -> Response:
        if not service.is_alive:
            raise unavailable("The engine has stopped", "engine_stopped")
        return JSONResponse({"status": "ok"})

    def ready() -> Response:
        engine = service.omni.engine
        if engine.is_closing or not service.is_alive:
            raise unavailable("The server is shutting down", "shutting_down")
        if len(engine.waiting) >= engine.max_queue:
            raise unavailable("The queue is full", "queue_full", engine.retry_after_s())
        return JSONResponse({"status": "ready"})

    def version() -> dict[str, str]:
        return {"version": lowbit.__version__}

    def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    def file(name: str) -> Response:
        return images.stored(service, name)

    errors = _errors(400, 401, 404, 405, 413, 503)
    plain = errors | {200: _content(CONTENT_TYPE.partition(";")[0])}
    picture = errors | {200: _content(*MEDIA_TYPES.values())}
    app.get("/v1/models", summary="List the served models", responses=errors)(models)
    app.get("/v1/models/{name:path}", summary="Describe a served model", responses=errors)(model)
    app.get("/health", summary="Whether the engine runs", response_model=None, responses=errors)(health)
    app.get("/ready", summary="Whether a request would be taken", response_model=None, responses=errors)(ready)
    app.get("/version", summary="The version of lowbit", responses=errors)(version)
    app.get("/metrics", summary="Figures for Prometheus", response_class=Response, responses=plain)(metrics)
    app.get("/files/{name}", summary="A picture of response_format url", response_class=Response, responses=picture)(
        file
    )


def _add_refusals(app: FastAPI) -> None:
    for path, reason in NOT_SERVED.items():
        app.add_api_route(path, _refusal(path, reason), methods=["GET", "POST"], include_in_schema=False)


def _refusal(path: str, reason: str) -> Callable[[], Awaitable[Response]]:
    async def refuse() -> Response:
        raise ApiError(404, f"{path} is not served: {reason}", None, "not_served")

    return refuse


def _describe(app: FastAPI) -> None:
    """Put the requests, whose bodies the handlers read themselves, into the OpenAPI document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = generate().setdefault("components", {}).setdefault("schemas", {})
            for _, request, _, _ in POSTS.values():
                schema = request.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[request.__name__] = schema
            files = {"type": "string", "format": "binary"}
            for methods in generate()["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)  # FastAPI's own: here it is 400
            form = schemas[EditRequest.__name__]
            form["properties"] |= {"image": {"type": "array", "items": files}, "mask": files}
            form["required"] = ["image", "prompt"]
        found: dict[str, Any] = generate()
        return found

    app.openapi = openapi  # type: ignore[method-assign]
