"""Questions to a model, answered by the inference workers. A waiting route holds no thread and no session."""

from __future__ import annotations

from fastapi import APIRouter, Request

from api.cancellation import while_connected
from api.deps import ApiKey, Db, ServicesDep
from api.schemas.predict import MAX_INPUTS, Answer, Prediction, Predictions, PredictRequest, Usage
from store import models
from store.errors import InvalidRequest, TooLarge
from store.messages.predict import Intervention, PredictModel

router = APIRouter(tags=["Answers"])


@router.post("/predict")
@router.post("/v1/predict", include_in_schema=False)
async def predict(
    request: Request, body: PredictRequest, key: ApiKey, db: Db, services: ServicesDep
) -> Prediction | Predictions:
    """Ask a fine-tuned model, a checkpoint or a base model one question, or up to 1,024 in `inputs`.

    Probabilities are calibrated where the model's job had validation rows. With `abstain_below` an answer that is less
    probable is null, and `abstained` true. Too many inputs waiting at once: 429 or 503, with `Retry-After`.
    """
    caller, model = await db(models.authorize, key=key, model_id=body.model)
    rows = body.rows()
    if len(rows) > MAX_INPUTS:
        raise TooLarge(f"at most {MAX_INPUTS:,} inputs at a time", param="inputs")
    if body.abstain_below is not None and body.asks_for_text:
        raise InvalidRequest("generated text has no probability to abstain below", param="abstain_below")
    intervention = Intervention(enabled=body.intervention.enabled, scale=body.intervention.scale)
    with services.admission.admit(len(rows)):
        asking = services.predict.ask(
            request.state.request_id, addressed(model, caller.id), rows, intervention
        )
        answers = await while_connected(request, asking)
    usage = Usage.of(
        prompt=sum(answer["prompt_tokens"] for answer in answers),
        completion=sum(answer["completion_tokens"] for answer in answers),
    )
    shown = [Answer.of(answer, abstain_below=body.abstain_below) for answer in answers]
    if body.inputs is None:
        return Prediction(model=body.model, usage=usage, **shown[0].model_dump())
    return Predictions(model=body.model, usage=usage, data=shown)


def addressed(model: models.Model, owner_id: str) -> PredictModel:
    """The model as a worker finds it: it has no database at hand while it answers."""
    return PredictModel(
        id=model.id,
        owner=owner_id,
        kind=model.kind,
        base_model=model.base_model,
        storage_key=model.storage_key,
        manifest=dict(model.manifest) or None,
    )
