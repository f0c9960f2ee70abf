"""/v1/embeddings: texts as vectors, by the base model or with adapters."""

from __future__ import annotations

import base64
import struct
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from ..request import ServeError
from ..texts import encode, read
from .caller import Caller, Served
from .described import EMBEDDINGS, ERRORS
from .schemas import EmbeddingBody, Program

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post("/embeddings", response_model=None, responses={200: EMBEDDINGS, **ERRORS})
async def embeddings(body: EmbeddingBody, request: Request, service: Served, tenant: Caller) -> Response:
    """Embed texts, by the base model or with an adapter."""
    given, extra = body.inputs(), body.molora or Program()

    def text() -> str:
        return "\n".join(read(service.tokenizer, one, service.engine.vocabulary) for one in given)

    def work() -> tuple[list[list[int]], Tensor, Any]:
        tokens = [encode(service.tokenizer, one) if isinstance(one, str) else one for one in given]
        program = service.program(tenant, body.model, text, extra.adapters, extra.selector)
        return tokens, *service.embed(tenant, program, tokens)

    # those who wait for the model wait among themselves, so that they hold up nobody else
    tokens, vectors, chosen = await to_thread.run_sync(work, limiter=request.app.state.waiters)
    if body.dimensions is not None:
        if body.dimensions > vectors.shape[1]:
            text_ = f"dimensions must be at most {vectors.shape[1]}, got {body.dimensions}"
            raise ServeError(text_, param="dimensions")
        vectors = vectors[:, : body.dimensions]
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
    data = []
    for index, vector in enumerate(vectors.tolist()):
        packed: Any = vector
        if body.encoding_format == "base64":
            packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": packed})
    count = sum(len(one) for one in tokens)
    usage = {"prompt_tokens": count, "total_tokens": count}
    told = {"object": "list", "data": data, "model": body.model, "usage": usage, "molora": dict(chosen)}
    return JSONResponse(told)
