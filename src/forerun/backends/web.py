"""JSON and text from a server, with its failures in one line."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from forerun.types import UserError


def fetch(url: str, body: dict[str, Any] | None, timeout_s: float, headers: Mapping[str, str] | None = None) -> Any:
    """JSON from a URL, posted to where there is a body; UserError in one line for whatever goes wrong."""
    data = None if body is None else json.dumps(body).encode()
    answer = read(urllib.request.Request(url, data, {"Content-Type": "application/json"} | dict(headers or {})), timeout_s)
    try:
        return json.loads(answer)
    except ValueError as error:
        raise UserError(f"{url} answers with something that is not JSON; is it OpenAI-compatible?") from error


def read(request: urllib.request.Request, timeout_s: float) -> bytes:
    """What a URL answers; UserError in one line where it does not."""
    url = request.full_url
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            found: bytes = answer.read()
            return found
    except urllib.error.HTTPError as error:
        with error:
            told = " ".join(error.read(300).decode(errors="replace").split())
        raise UserError(f"{url} answers with status {error.code}: {told or error.reason}; {remedy(error.code)}") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise UserError(f"{url} gave no answer within {timeout_s:g} s; is the server overloaded?") from error
        raise UserError(f"{url} cannot be reached: {reason}; is the server running there?") from error


def remedy(status: int) -> str:
    known = {
        401: "start the server without a key",
        403: "start the server without a key",
        404: "check the URL, and the model's name with --model",
        429: "the server is too busy, try again alone on it",
        503: "the server is too busy, try again alone on it",
    }
    return known.get(status, "look into the server's log" if status >= 500 else "check --model, --tokens and the prompts")


def base_of(url: str) -> str | None:
    """The address that ends in /v1, for a URL with or without it; None for what is no URL."""
    return url.rstrip("/").removesuffix("/v1") + "/v1" if url.startswith(("http://", "https://")) else None
