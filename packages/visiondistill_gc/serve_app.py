"""The HTTP service: one page, one question, and clear refusals. FastAPI, no outside request."""

# No `from __future__ import annotations`: FastAPI reads the annotations of the functions below.

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from visiondistill_gc.deploy_model import Classifier, top_classes
from visiondistill_gc.serve_batcher import Batcher, BusyError
from visiondistill_gc.serve_upload import IMAGE_TYPES, Limits, UploadError, view_of_upload

STATIC = Path(__file__).with_name("static")
PAGE = {
    "index.html": "text/html; charset=utf-8",
    "serve.css": "text/css; charset=utf-8",
    "serve.js": "text/javascript; charset=utf-8",
}
FIELD = "file"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
QUESTION = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {
                        FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}}
                    },
                }
            },
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in IMAGE_TYPES},
        },
    }
}


def create_app(
    classifier: Classifier,
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
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException

    allowed = Limits() if limits is None else limits
    names = classifier.description.class_names
    view = classifier.view

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(
            classifier.probabilities, max_batch=max_batch, max_wait=max_wait, max_queue=max_queue
        )
        app.state.decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        app.state.open_requests = 0
        app.state.started = time.monotonic()
        yield
        # All requests are answered by now; a thread must not be waited for in the event loop.
        await asyncio.to_thread(app.state.batcher.close)
        app.state.decoders.shutdown()

    # Their documentation pages load scripts from elsewhere; /openapi.json stays.
    app = FastAPI(title="visiondistill_gc", lifespan=lifespan, docs_url=None, redoc_url=None)

    def refusal(status: int, code: str, message: str) -> JSONResponse:
        headers = {"Retry-After": "1"} if status == 503 else None
        body = {"error": {"code": code, "message": " ".join(message.split())}}
        return JSONResponse(body, status_code=status, headers=headers)

    @app.exception_handler(UploadError)
    async def refused(request: Request, error: UploadError) -> JSONResponse:
        return refusal(error.status, error.code, str(error))

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> JSONResponse:
        return refusal(503, "busy", str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return refusal(400, "bad_parameter", f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "wrong_method"}.get(error.status_code, "refused")
        answer = refusal(error.status_code, code, f"{request.url.path}: {error.detail}")
        answer.headers.update(error.headers or {})
        return answer

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Any) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return static("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    def static(name: str) -> Response:
        if name not in PAGE:
            raise HTTPException(404, "Not Found")
        return Response((STATIC / name).read_bytes(), headers={"Content-Type": PAGE[name]})

    @app.get("/favicon.ico", include_in_schema=False)
    def favicon() -> Response:
        return Response(status_code=204)

    @app.get("/health")
    async def health(request: Request) -> dict[str, Any]:
        state = request.app.state
        batcher = state.batcher
        return {
            "status": "ok",
            "runtime": classifier.runtime,
            "seconds": round(time.monotonic() - state.started, 3),
            "waiting": batcher.waiting,
            "images": batcher.images,
            "batches": batcher.batches,
            "largest_batch": batcher.largest,
        }

    @app.get("/model")
    async def model() -> dict[str, Any]:
        return {
            "class_names": names,
            "input_size": classifier.description.input_size,
            "runtime": classifier.runtime,
            "limits": {
                "bytes": allowed.max_bytes,
                "pixels": allowed.max_pixels,
                "files": allowed.max_files,
            },
        }

    @app.post("/predict", openapi_extra=QUESTION)
    async def predict(request: Request, top: int = 3) -> dict[str, Any]:
        state = request.app.state
        if not 1 <= top:
            raise UploadError(400, "bad_parameter", f"top: got {top}, expected 1 or more")
        if state.open_requests >= allowed.max_requests:
            raise BusyError(f"{state.open_requests} requests are open already, try again later")
        state.open_requests += 1
        try:
            uploads = await read_uploads(request, allowed)
            start = time.perf_counter()
            loop = asyncio.get_running_loop()

            def decode(upload: tuple[str, bytes]) -> Any:
                return view_of_upload(upload[1], name=upload[0], view=view, limits=allowed)

            # Decoded all before one is queued: a request is answered whole or refused whole.
            images = [await loop.run_in_executor(state.decoders, decode, one) for one in uploads]
            answers = [asyncio.wrap_future(state.batcher.submit(image)) for image in images]
            rows = await asyncio.gather(*answers)
        finally:
            state.open_requests -= 1
        found = []
        for (file, _), row in zip(uploads, rows, strict=True):
            best = top_classes(row, names, min(top, len(names)))
            found.append({"file": file, **best[0], "top": best})
        return {"predictions": found, "ms": round(1e3 * (time.perf_counter() - start), 3)}

    return app


async def read_uploads(request: Any, limits: Limits) -> list[tuple[str, bytes]]:
    """Names and contents of the files of a request, one or more.

    Raises:
        UploadError: 400 not one file in the field ``file``, 408 too slow, 413 too much, 415 a type
            of body that is not taken.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data" and kind not in IMAGE_TYPES:
        raise UploadError(
            415,
            "unsupported_media_type",
            f"Content-Type is {kind or 'missing'}, expected multipart/form-data or one of "
            f"{', '.join(sorted(IMAGE_TYPES))}",
        )
    try:
        body = await asyncio.wait_for(read_body(request, limits.max_bytes), limits.read_seconds)
    except asyncio.TimeoutError:  # noqa: UP041 - another class than TimeoutError before 3.11
        raise UploadError(
            408, "too_slow", f"the body did not arrive within {limits.read_seconds:g} seconds"
        ) from None
    if kind in IMAGE_TYPES:
        return [("body", body)]
    return await read_form(request, body, limits)


async def read_body(request: Any, most: int) -> bytes:
    """The body, at most ``most`` bytes.

    What is too long is read on for a while and thrown away: a client that is still sending when
    the connection closes would never see why.
    """
    from starlette.requests import ClientDisconnect

    stated = request.headers.get("content-length", "")
    too_long = UploadError(413, "too_large", f"the request is longer than {most} bytes")
    if stated.isdecimal() and int(stated) > 8 * most:
        raise too_long
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= most:
                parts.append(part)
            elif size > 8 * most:
                break
    except ClientDisconnect:
        raise UploadError(400, "incomplete", "the connection closed within the body") from None
    if size > most:
        raise too_long
    return b"".join(parts)


async def read_form(request: Any, body: bytes, limits: Limits) -> list[tuple[str, bytes]]:
    """Files in the field ``file`` of a form."""
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def whole() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(
        request.headers, whole(), max_files=limits.max_files, max_fields=limits.max_files
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # KeyError: no boundary
        reason = getattr(error, "message", "") or "no boundary"
        code = "too_many_files" if "Too many" in reason else "bad_form"
        status = 413 if code == "too_many_files" else 400
        raise UploadError(status, code, f"the form cannot be read: {reason}") from None
    try:
        wrong = sorted({name for name, _ in form.multi_items() if name != FIELD})
        if wrong:
            raise UploadError(
                400, "wrong_field", f"the form has a field {wrong[0]!r}, expected {FIELD!r} only"
            )
        found = []
        for item in form.getlist(FIELD):
            if isinstance(item, str):
                raise UploadError(
                    400, "wrong_field", f"the field {FIELD!r} holds text, expected a file"
                )
            found.append((Path(item.filename or "file").name[:200], await item.read()))
    finally:
        await form.close()
    if not found:
        raise UploadError(400, "no_file", f"the form has no file, expected the field {FIELD!r}")
    return found
