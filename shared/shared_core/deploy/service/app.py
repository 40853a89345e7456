"""The HTTP service: one page, one question, and clear refusals. FastAPI, no outside request."""

# No `from __future__ import annotations`: FastAPI reads the annotations of the functions below.

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from shared_core.deploy.answers import make_answer
from shared_core.deploy.inputs import Source, no_images
from shared_core.deploy.predictor import Outputs, Predictor
from shared_core.deploy.service.batcher import Batcher, BusyError, Put
from shared_core.deploy.service.forms import FIELD, FORM, read_uploads
from shared_core.deploy.service.uploads import Limits, UploadError, check_upload, view_of_upload

STATIC = Path(__file__).with_name("static")
PAGE = {
    "index.html": "text/html; charset=utf-8",
    "serve.css": "text/css; charset=utf-8",
    "serve.js": "text/javascript; charset=utf-8",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_FILE = {"type": "string", "format": "binary"}
QUESTION = {
    "requestBody": {
        "required": True,
        "content": {
            FORM: {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {FIELD: {"type": "array", "items": _FILE}},
                }
            },
            "image/*": {"schema": _FILE},
            "application/octet-stream": {"schema": _FILE},
        },
    }
}


def create_app(
    predictor: Predictor,
    *,
    limits: Limits | None = None,
    max_batch: int = 16,
    max_wait: float = 0.002,
    max_queue: int = 256,
    decode_threads: int = 2,
) -> Any:
    """A FastAPI application; its lifespan starts and drains the batcher.

    ``GET /`` the page, ``GET /health``, ``GET /model``, ``POST /predict?top=K`` with the field
    ``file`` (once or more) of a form, or an image as the body.

    Args:
        limits: what a request may bring.
        max_batch, max_wait, max_queue: see :class:`Batcher`.
        decode_threads: decode uploads.
    """
    from fastapi import FastAPI, Request

    service = _Service(predictor, Limits() if limits is None else limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for size in {1, max_batch}:  # the first pass of a batch size costs more
            predictor.outputs(no_images(predictor.view, size))
        service.batcher = Batcher(
            service.run, max_batch=max_batch, max_wait=max_wait, max_queue=max_queue
        )
        service.decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        service.started = time.monotonic()
        yield
        # All requests are answered by now; a thread must not be waited for in the event loop.
        await asyncio.to_thread(service.batcher.close)
        service.decoders.shutdown()

    # Their documentation pages load scripts from elsewhere; /openapi.json stays.
    app = FastAPI(title="smallvision", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_refusals(app)
    _add_page(app)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return service.health()

    @app.get("/model")
    async def model() -> dict[str, Any]:
        return service.model()

    @app.post("/predict", openapi_extra=QUESTION)
    async def predict(request: Request, top: int = 3) -> dict[str, Any]:
        if top < 1:
            raise UploadError(400, "bad_parameter", f"top: got {top}, expected 1 or more")
        return await service.predict(request, top)

    return app


class _Service:
    """The model, and what is open; used in the event loop only."""

    batcher: Batcher
    decoders: ThreadPoolExecutor
    started: float

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor, self.limits = predictor, limits
        self.open_requests = 0

    def run(self, images: Any) -> list[Outputs]:
        """A batch's outputs, one a image; in the batcher's thread."""
        values, exits = self.predictor.outputs(images)
        return [
            Outputs(values[n : n + 1], None if exits is None else exits[n : n + 1])
            for n in range(len(values))
        ]

    def health(self) -> dict[str, Any]:
        return {
            "status": "ok",
            "runtime": self.predictor.runtime,
            "seconds": round(time.monotonic() - self.started, 3),
            "open_requests": self.open_requests,
            "waiting": self.batcher.waiting,
            "images": self.batcher.images,
            "batches": self.batcher.batches,
            "largest_batch": self.batcher.largest,
        }

    def model(self) -> dict[str, Any]:
        facts, predictor = self.predictor.facts, self.predictor
        heads = 0 if facts.exits is None else len(facts.exits.costs)
        return {
            "project": facts.project,
            "architecture": facts.architecture,
            "task": facts.task,
            "class_names": facts.class_names,
            "input_size": facts.input_size,
            "runtime": predictor.runtime,
            "exits": [
                {"exit": predictor.exit_name(n), "macs": predictor.macs(n)} for n in range(heads)
            ],
            "policy": predictor.policy_state(),
            "unknown_threshold": facts.unknown_threshold,
            "limits": {
                "bytes": self.limits.max_bytes,
                "pixels": self.limits.max_pixels,
                "files": min(self.limits.max_files, self.batcher.max_queue),
            },
        }

    async def predict(self, request: Any, top: int) -> dict[str, Any]:
        """Read, check, find room for all, decode, ask: a request is answered or refused whole."""
        if self.open_requests >= self.limits.max_requests:
            raise BusyError(f"{self.open_requests} requests are open already, try again later")
        self.open_requests += 1
        try:
            uploads = await read_uploads(request, self.limits)
            if len(uploads) > self.batcher.max_queue:
                raise UploadError(
                    413,
                    "too_many_files",
                    f"{len(uploads)} images, expected at most the {self.batcher.max_queue} that "
                    "may wait here",
                )
            start = time.perf_counter()
            with self.batcher.room(len(uploads)) as put:
                answers = await self._within_time(self._ask(uploads, put))
        finally:
            self.open_requests -= 1
        found = []
        for (file, _), outputs in zip(uploads, answers, strict=True):
            answer = make_answer(self.predictor, Source(file), outputs, 0, top=top).as_json()
            del answer["path"], answer["ms"]
            found.append({"file": file, **answer})
        took = {"ms": round(1e3 * (time.perf_counter() - start), 3)}
        # One image is also answered at the top, for those who sent one and want one answer.
        first = {key: value for key, value in found[0].items() if key != "file"}
        return {"predictions": found, **(first if len(found) == 1 else {}), **took}

    async def _within_time(self, answers: Any) -> Sequence[Outputs]:
        try:
            return await asyncio.wait_for(answers, self.limits.answer_seconds)
        except asyncio.TimeoutError:  # noqa: UP041 - another class than TimeoutError before 3.11
            raise BusyError(
                f"no answer within {self.limits.answer_seconds:g} seconds, try again later"
            ) from None

    async def _ask(self, uploads: Sequence[tuple[str, bytes]], put: Put) -> list[Outputs]:
        loop = asyncio.get_running_loop()
        for name, data in uploads:  # all headers before any pixels
            check_upload(data, name=name, limits=self.limits)

        def decode(upload: tuple[str, bytes]) -> Any:
            return view_of_upload(upload[1], name=upload[0], view=self.predictor.view)

        images = [await loop.run_in_executor(self.decoders, decode, one) for one in uploads]
        futures: list[Future[Outputs]] = put(images)
        return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))


def _refusal(status: int, code: str, message: str) -> Any:
    from fastapi.responses import JSONResponse

    headers = {"Retry-After": "1"} if status == 503 else None
    body = {"error": {"code": code, "message": " ".join(message.split())}}
    return JSONResponse(body, status_code=status, headers=headers)


def _add_refusals(app: Any) -> None:
    """Every error as JSON with a code and one line."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    async def refused(request: Request, error: UploadError) -> Any:
        return _refusal(error.status, error.code, str(error))

    async def busy(request: Request, error: BusyError) -> Any:
        return _refusal(503, "busy", str(error))

    async def invalid(request: Request, error: RequestValidationError) -> Any:
        first = error.errors()[0]
        return _refusal(400, "bad_parameter", f"{first['loc'][-1]}: {first['msg']}")

    async def other(request: Request, error: HTTPException) -> Any:
        code = {404: "not_found", 405: "wrong_method"}.get(error.status_code, "refused")
        answer = _refusal(error.status_code, code, f"{request.url.path}: {error.detail}")
        answer.headers.update(error.headers or {})
        return answer

    async def add_headers(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    app.add_exception_handler(UploadError, refused)
    app.add_exception_handler(BusyError, busy)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, other)
    app.middleware("http")(add_headers)


def _add_page(app: Any) -> None:
    """The page and its two files, none of which asks for anything else."""
    from fastapi.responses import Response
    from starlette.exceptions import HTTPException

    def static(name: str) -> Response:
        if name not in PAGE:
            raise HTTPException(404, "Not Found")
        return Response((STATIC / name).read_bytes(), headers={"Content-Type": PAGE[name]})

    def page() -> Response:
        return static("index.html")

    def favicon() -> Response:
        return Response(status_code=204)

    app.get("/", include_in_schema=False)(page)
    app.get("/static/{name}", include_in_schema=False)(static)
    app.get("/favicon.ico", include_in_schema=False)(favicon)
