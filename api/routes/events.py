"""Events of a job, as a list or as a stream until the job has ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import Response
from pydantic import BeforeValidator
from sqlalchemy.orm import Session
from sse_starlette import EventSourceResponse, ServerSentEvent

from api.database import Database
from api.deps import After, Caller, Db, Limit
from api.schemas.common import Listing
from api.schemas.job_object import EventObject
from store import keys
from store.db.states import TERMINAL
from store.db.tables import Event
from store.errors import Unavailable
from store.jobs import jobs

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"])
log = logging.getLogger(__name__)

#: A client that has received no event yet may send an empty one.
LastEventId = Annotated[int, Header(ge=0, lt=2**63), BeforeValidator(lambda value: value or 0)]

#: A stream polls the database for new events at this interval, and reads this many at once.
POLL_SECONDS = 0.5
BATCH = 100
#: Without events, a comment at this interval keeps proxies from closing the stream.
HEARTBEAT_SECONDS = 15


@router.get(
    "/{job_id}/events",
    response_model=Listing[EventObject],
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def list_events(
    job_id: str,
    caller: Caller,
    db: Db,
    after: After = None,
    limit: Limit = 20,
    stream: bool = False,
    last_event_id: LastEventId = 0,
) -> Response | Listing[EventObject]:
    """Events, newest first.

    `stream=true`: server-sent events, oldest first, after `Last-Event-ID` and until the job has ended. Their `id` is
    the event's number within the job.
    """
    if not stream:
        page = await db(jobs.list_events, owner_id=caller.id, job_id=job_id, limit=limit, after=after)
        return Listing.of([EventObject.of(event) for event in page.items], has_more=page.has_more)
    await db(jobs.get, owner_id=caller.id, job_id=job_id)  # a 404 must come before the stream starts
    return EventSourceResponse(
        _follow(db, caller=caller, job_id=job_id, seq=last_event_id), ping=HEARTBEAT_SECONDS
    )


async def _follow(
    db: Database, *, caller: keys.Owner, job_id: str, seq: int
) -> AsyncIterator[ServerSentEvent]:
    """Each poll has a session of its own, so that an open stream holds no connection."""
    ended = False
    while not ended:
        try:
            ended, events = await db(_next, caller=caller, job_id=job_id, seq=seq)
        except Unavailable as fault:
            log.warning("event stream of %s waits for the database: %s", job_id, fault)
            events = ()
        for event in events:
            seq = event.seq
            yield ServerSentEvent(id=str(seq), data=EventObject.of(event).model_dump_json())
        if not events and not ended:
            await asyncio.sleep(POLL_SECONDS)


def _next(session: Session, *, caller: keys.Owner, job_id: str, seq: int) -> tuple[bool, Sequence[Event]]:
    """Returns the next events, and whether the stream ends with them: the job has, or the key was revoked.

    The state is read first, so that the event that ended the job is among them.
    """
    if not keys.is_valid(session, key_id=caller.key_id):
        return True, ()
    state = jobs.get(session, owner_id=caller.id, job_id=job_id).state
    events = jobs.events_after(session, owner_id=caller.id, job_id=job_id, seq=seq, limit=BATCH)
    return state in TERMINAL and len(events) < BATCH, events
