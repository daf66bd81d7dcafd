"""Questions to a model, answered by the inference workers. A waiting route holds no thread and no session."""

from __future__ import annotations

from fastapi import APIRouter, Request

from api.cancellation import while_connected
from api.deps import Caller, Db, ServicesDep
from api.rate_limits import HEADERS
from api.schemas.predict import Prediction, Predictions, PredictRequest
from store import models
from store.errors import InvalidRequest
from store.messages.predict import Intervention

router = APIRouter(tags=["Answers"])


@router.post("/predict", responses={200: {"headers": HEADERS}})
@router.post("/v1/predict", include_in_schema=False)
async def predict(
    request: Request, body: PredictRequest, caller: Caller, db: Db, services: ServicesDep
) -> Prediction | Predictions:
    """Ask a fine-tuned model, a checkpoint or a base model one question, or up to 1,024 in `inputs`.

    Probabilities are calibrated where the model's job had validation rows. With `abstain_below` an answer that is less
    probable is null, and `abstained` true. Too many inputs waiting at once: 429 or 503, with `Retry-After`.
    """
    model = await db(models.get, owner_id=caller.id, model_id=body.model)
    rows = body.rows()
    if body.abstain_below is not None and any("question" not in row for row in rows):
        raise InvalidRequest("generated text has no probability to abstain below", param="abstain_below")
    with services.admission.admit(len(rows)) as limit:
        request.state.headers.update(limit.headers())
        prediction = services.predict.predict(
            request.state.request_id,
            model,
            caller.id,
            rows,
            Intervention(enabled=body.intervention.enabled, scale=body.intervention.scale),
        )
        predicted = await while_connected(request, prediction)
    return body.response(predicted)
