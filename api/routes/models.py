"""Models: base models, fine-tuned ones, and archives of them. Model ids contain `:` and `/`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from api.deps import Caller, Db, ServicesDep
from api.schemas.common import Deleted, Listing
from api.schemas.models import ExportPending, ModelObject
from api.stored_response import stored_response
from store import exports, models
from store.errors import WrongState

router = APIRouter(prefix="/v1/models", tags=["Models"])

_EXPORT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}},
    202: {"model": ExportPending, "description": "A worker builds it: retry after Retry-After seconds"},
}


@router.get("")
async def list_models(caller: Caller, db: Db) -> Listing[ModelObject]:
    """The caller's fine-tuned models and all base models. Not paged."""
    return Listing.of([ModelObject.of(model) for model in await db(models.list_models, owner_id=caller.id)])


# Must precede the routes below, whose path parameter would match `/export` too.
@router.get("/{model_id:path}/export", responses=_EXPORT_RESPONSES, response_class=Response)
async def export_model(
    model_id: str, caller: Caller, db: Db, services: ServicesDep, format: exports.Format = "bundle"
) -> Response:
    """The model as a tar archive: HEFT's bundle, a merged model, a PEFT adapter, or pyreft's interventions."""
    export = await db(exports.request, owner_id=caller.id, model_id=model_id, format=format)
    if export.state == "failed":
        error = export.error or {}
        raise WrongState(error["message"], param=error["param"], code=error["code"])
    if export.storage_key is None:
        services.hints.export(model_id, format)
        pending = ExportPending(model=model_id, format=format, status=export.state)
        return JSONResponse(pending.model_dump(), status_code=202, headers={"Retry-After": "2"})
    name = f"{model_id.rpartition(':')[2]}-{format}.tar"
    return await stored_response(
        services.artifacts,
        export.storage_key,
        media_type="application/x-tar",
        size=export.bytes,
        filename=name,
    )


@router.get("/{model_id:path}")
async def retrieve_model(model_id: str, caller: Caller, db: Db) -> ModelObject:
    """A base model, a fine-tuned model, or a checkpoint."""
    return ModelObject.of(await db(models.get, owner_id=caller.id, model_id=model_id))


@router.delete("/{model_id:path}")
async def delete_model(model_id: str, caller: Caller, db: Db) -> Deleted:
    """Deletes a fine-tuned model or a checkpoint. Base models can't be deleted."""
    await db(models.delete, owner_id=caller.id, model_id=model_id)
    return Deleted(id=model_id, object="model")
