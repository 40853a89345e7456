"""The body of a request: read within its limits, then one image or the files of a form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import PurePosixPath
from typing import Any

from shared_core.deploy.service.uploads import Limits, UploadError

FIELD = "file"
FORM = "multipart/form-data"
# What curl and others say of a body that is a file; its first bytes decide what it is.
PLAIN = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded"})


async def read_uploads(request: Any, limits: Limits) -> list[tuple[str, bytes]]:
    """Names and contents of the files of a request, one or more.

    Raises:
        UploadError: 400 not one file in the field ``file``, 408 too slow, 413 too much, 415 a type
            of body that is not taken.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != FORM and kind not in PLAIN and not kind.startswith("image/"):
        raise UploadError(
            415,
            "unsupported_media_type",
            f"Content-Type is {kind}, expected {FORM}, or an image as the body",
        )
    try:
        body = await asyncio.wait_for(_read_body(request, limits.max_bytes), limits.read_seconds)
    except asyncio.TimeoutError:  # noqa: UP041 - another class than TimeoutError before 3.11
        raise UploadError(
            408, "too_slow", f"the body did not arrive within {limits.read_seconds:g} seconds"
        ) from None
    if kind != FORM:
        return [("body", body)]
    return await _read_form(request, body, limits)


async def _read_body(request: Any, most: int) -> bytes:
    """The body, at most ``most`` bytes.

    What is too long is read on for a while and thrown away: a client that is still sending when
    the connection closes would never see why.
    """
    from starlette.requests import ClientDisconnect

    stated = request.headers.get("content-length", "")
    too_long = UploadError(413, "too_large", f"the request is longer than {most} bytes")
    if stated.isdecimal() and (len(stated) > 15 or int(stated) > 8 * most):
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


async def _read_form(request: Any, body: bytes, limits: Limits) -> list[tuple[str, bytes]]:
    """Files in the field ``file`` of a form."""
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def whole() -> AsyncGenerator[bytes, None]:
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
            name = PurePosixPath((item.filename or "file").replace("\\", "/")).name[:200]
            found.append((name or "file", await item.read()))
    finally:
        await form.close()
    if not found:
        raise UploadError(400, "no_file", f"the form has no file, expected the field {FIELD!r}")
    return found
