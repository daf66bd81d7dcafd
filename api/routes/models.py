"""Models: those that may be trained, those that were, and archives of them. Their ids hold `:` and `/`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from api.deps import Caller, Db, ServicesDep
from api.schemas.common import Deleted, Listing
from api.schemas.models import ExportPending, ModelObject
from api.stored_response import stored
from store import exports, models
from store.errors import Conflict

router = APIRouter(prefix="/v1/models", tags=["Models"])

_EXPORT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}},
    202: {"model": ExportPending, "description": "A worker builds it: ask again after Retry-After seconds"},
}


@router.get("")
async def list_models(caller: Caller, db: Db) -> Listing[ModelObject]:
    """The fine-tuned models of the caller and every base model. Never paged."""
    return Listing.of([ModelObject.of(model) for model in await db(models.list_models, owner_id=caller.id)])


# Before the routes below it, whose path would take it for a part of a model's id.
@router.get("/{model_id:path}/export", responses=_EXPORT_RESPONSES, response_class=Response)
async def export_model(
    model_id: str, caller: Caller, db: Db, services: ServicesDep, format: exports.Format = "bundle"
) -> Response:
    """The model as a tar: HEFT's own bundle, a plain merged model, a PEFT adapter, pyreft's interventions."""
    export = await db(exports.request, owner_id=caller.id, model_id=model_id, format=format)
    if export.state == "failed":
        error = export.error or {}
        raise Conflict(error["message"], param=error["param"], code=error["code"])
    if export.storage_key is None:
        services.hints.export(model_id, format)
        pending = ExportPending(model=model_id, format=format, status=export.state)
        return JSONResponse(pending.model_dump(), status_code=202, headers={"Retry-After": "2"})
    name = f"{model_id.rpartition(':')[2]}-{format}.tar"
    return await stored(
        services.artifacts,
        export.storage_key,
        media_type="application/x-tar",
        size=export.bytes,
        filename=name,
    )


@router.get("/{model_id:path}")
async def retrieve_model(model_id: str, caller: Caller, db: Db) -> ModelObject:
    """A base model, a fine-tuned one, or a checkpoint."""
    return ModelObject.of(await db(models.get, owner_id=caller.id, model_id=model_id))


@router.delete("/{model_id:path}")
async def delete_model(model_id: str, caller: Caller, db: Db) -> Deleted:
    """Delete a fine-tuned model or a checkpoint's. Base models belong to the service."""
    await db(models.delete, owner_id=caller.id, model_id=model_id)
    return Deleted(id=model_id, object="model")
