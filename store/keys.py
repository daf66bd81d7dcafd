"""API keys: `heft_<id>_<secret>`. Only the SHA-256 of the secret is kept; the key itself is shown once.

A key is found by its id and compared in constant time. An operator may bring a key of any shape; its id is
then derived from it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from sqlalchemy import func, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from store.db.tables import ApiKey
from store.errors import Conflict, InvalidRequest, NotFound, Unauthenticated

_OWN_FORMAT = re.compile(r"heft_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
#: Part of model ids, whose parts are separated by colons.
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SEEN_EVERY = text("interval '1 minute'")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who is asking. `id` is part of every query made for them."""

    id: str
    key_id: str


def create(session: Session, *, owner_id: str, name: str, key: str | None = None) -> str:
    """Issue a key (or take `key` as it is) for an owner. Returns the full key, which is stored nowhere."""
    issued = key if key is not None else f"heft_{secrets.token_hex(8)}_{secrets.token_urlsafe(32)}"
    ensure(session, issued, owner_id, name)
    return issued


def ensure(session: Session, key: str, owner_id: str, name: str) -> None:
    """Make `key` known, if it isn't. A key that was revoked stays revoked. Raises InvalidRequest for an
    owner's name that can't be part of a model id, Conflict when the id in the key belongs to another secret.
    """
    if not _OWNER.fullmatch(owner_id):
        raise InvalidRequest("an owner is letters, digits, '.', '_' or '-', at most 64", param="owner_id")
    if not key:
        raise InvalidRequest("an API key can't be empty", param="key")
    key_id, secret_hash = _split(key)
    row = {"id": key_id, "owner_id": owner_id, "name": name, "secret_hash": secret_hash}
    session.execute(insert(ApiKey).values(row).on_conflict_do_nothing(index_elements=[ApiKey.id]))
    known = session.scalars(select(ApiKey.secret_hash).where(ApiKey.id == key_id)).one()
    if not hmac.compare_digest(known, secret_hash):
        raise Conflict(f"another key has the id {key_id}", param="key")


def authenticate(session: Session, key: str) -> Owner:
    """Whose key it is. Raises Unauthenticated for one that nobody issued, or that was revoked."""
    key_id, secret_hash = _split(key)
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < func.now() - _SEEN_EVERY)
    row = session.execute(
        select(ApiKey.owner_id, ApiKey.secret_hash, stale).where(
            ApiKey.id == key_id, ApiKey.revoked_at.is_(None)
        )
    ).one_or_none()
    if row is None or not hmac.compare_digest(row.secret_hash, secret_hash):
        raise Unauthenticated("this API key is not known here; make one with `heft keys create`")
    if row[2]:
        _note_use(session, key_id)
    return Owner(id=row.owner_id, key_id=key_id)


def list_keys(session: Session, *, owner_id: str | None = None) -> list[ApiKey]:
    """All keys, or one owner's, newest first; revoked ones too."""
    query = select(ApiKey).order_by(ApiKey.created_at.desc(), ApiKey.id.desc())
    if owner_id is not None:
        query = query.where(ApiKey.owner_id == owner_id)
    return list(session.scalars(query))


def revoke(session: Session, *, key_id: str, owner_id: str | None = None) -> None:
    """End a key for good. Raises NotFound for one that isn't there, is revoked, or is not `owner_id`'s (when
    given).
    """
    statement = (
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .returning(ApiKey.id)
        .execution_options(synchronize_session=False)
    )
    if owner_id is not None:
        statement = statement.where(ApiKey.owner_id == owner_id)
    if session.scalar(statement) is None:
        raise NotFound(f"no key {key_id!r}", param="key_id")


def _split(key: str) -> tuple[str, bytes]:
    match = _OWN_FORMAT.fullmatch(key)
    if match:
        return match[1], hashlib.sha256(match[2].encode()).digest()
    whole = key.encode(errors="surrogatepass")
    return "x" + hashlib.sha256(b"id:" + whole).hexdigest()[:15], hashlib.sha256(whole).digest()


def _note_use(session: Session, key_id: str) -> None:
    # SKIP LOCKED: requests with the same key must not wait for each other's transactions over a timestamp.
    free = select(ApiKey.id).where(ApiKey.id == key_id).with_for_update(skip_locked=True)
    session.execute(
        update(ApiKey)
        .where(ApiKey.id.in_(free))
        .values(last_used_at=func.now())
        .execution_options(synchronize_session=False)
    )
