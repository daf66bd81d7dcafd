"""API keys: `heft_<id>_<secret>`. Only the SHA-256 of the secret is stored; the key itself is shown once.

A key is looked up by its id and compared in constant time. An operator may set a key of another format, of at least 16
characters; its id is then derived from it.
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

_KEY = re.compile(r"heft_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
#: Owners are part of model ids, whose parts are separated by colons.
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: A shorter key could be guessed; a longer one is nobody's.
MIN_KEY_CHARS, MAX_KEY_CHARS = 16, 512
_FORM = re.compile(rf"(?! )[\x20-\x7e]{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}(?<! )")
_FORM_DESCRIPTION = f"{MIN_KEY_CHARS} to {MAX_KEY_CHARS} characters of ASCII, and no space at its ends"
_LAST_USED_PRECISION = text("interval '1 minute'")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The owner of an authenticated key. `id` is part of every query made for them."""

    id: str
    key_id: str


def create(session: Session, *, owner_id: str, name: str, key: str | None = None) -> str:
    """Issues a key for an owner, or registers `key`. Returns the full key, which is stored nowhere. Raises as
    `ensure`.
    """
    issued = key if key is not None else f"heft_{secrets.token_hex(8)}_{secrets.token_urlsafe(32)}"
    ensure(session, issued, owner_id, name)
    return issued


def ensure(session: Session, key: str, owner_id: str, name: str) -> None:
    """Registers `key` unless it is known already. A revoked key stays revoked.

    Raises InvalidRequest for an owner that can't be part of a model id or a key that is too short, Conflict when the id
    in the key belongs to another secret.
    """
    if not _OWNER.fullmatch(owner_id):
        message = "an owner must consist of letters, digits, '.', '_' and '-', 64 of them at most"
        raise InvalidRequest(message, param="owner_id")
    if not _FORM.fullmatch(key):
        raise InvalidRequest(f"an API key has {_FORM_DESCRIPTION}", param="key")
    key_id, secret_hash = _split(key)
    row = {"id": key_id, "owner_id": owner_id, "name": name, "secret_hash": secret_hash}
    session.execute(insert(ApiKey).values(row).on_conflict_do_nothing(index_elements=[ApiKey.id]))
    stored_hash = session.scalars(select(ApiKey.secret_hash).where(ApiKey.id == key_id)).one()
    if not hmac.compare_digest(stored_hash, secret_hash):
        raise Conflict(f"another key has the id {key_id}", param="key")


def check_form(key: str) -> None:
    """Raises Unauthenticated for a string that can't be a key. Needs no database."""
    if not _FORM.fullmatch(key):
        raise Unauthenticated(f"this is no API key: one has {_FORM_DESCRIPTION}")


def authenticate(session: Session, key: str) -> Owner:
    """Returns the owner of a key. Raises Unauthenticated for an unknown or revoked one."""
    key_id, secret_hash = _split(key)
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < func.now() - _LAST_USED_PRECISION)
    row = session.execute(
        select(ApiKey.owner_id, ApiKey.secret_hash, stale.label("stale")).where(
            ApiKey.id == key_id, ApiKey.revoked_at.is_(None)
        )
    ).one_or_none()
    if row is None or not hmac.compare_digest(row.secret_hash, secret_hash):
        raise Unauthenticated("this API key is unknown; create one with `heft keys create`")
    if row.stale:
        _update_last_used(session, key_id)
    return Owner(id=row.owner_id, key_id=key_id)


def is_valid(session: Session, *, key_id: str) -> bool:
    """Returns whether a key that was authenticated has not been revoked since."""
    query = select(ApiKey.id).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
    return session.scalar(query) is not None


def list_keys(session: Session, *, owner_id: str | None = None) -> list[ApiKey]:
    """Returns all keys, or one owner's, newest first; revoked ones too."""
    query = select(ApiKey).order_by(ApiKey.created_at.desc(), ApiKey.id.desc())
    if owner_id is not None:
        query = query.where(ApiKey.owner_id == owner_id)
    return list(session.scalars(query))


def revoke(session: Session, *, key_id: str, owner_id: str | None = None) -> None:
    """Revokes a key for good. Raises NotFound for a key that is unknown, revoked or not `owner_id`'s (if set)."""
    statement = (
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .returning(ApiKey.id)
    )
    if owner_id is not None:
        statement = statement.where(ApiKey.owner_id == owner_id)
    if session.scalar(statement) is None:
        raise NotFound(f"there is no key {key_id!r}", param="key_id")


def _split(key: str) -> tuple[str, bytes]:
    """Returns the id of a key and the SHA-256 of its secret."""
    match = _KEY.fullmatch(key)
    if match:
        return match[1], hashlib.sha256(match[2].encode()).digest()
    encoded = key.encode(errors="surrogatepass")
    return "x" + hashlib.sha256(b"id:" + encoded).hexdigest()[:15], hashlib.sha256(encoded).digest()


def _update_last_used(session: Session, key_id: str) -> None:
    # SKIP LOCKED: requests with the same key must not wait for each other's transactions over a timestamp.
    unlocked = select(ApiKey.id).where(ApiKey.id == key_id).with_for_update(skip_locked=True)
    session.execute(update(ApiKey).where(ApiKey.id.in_(unlocked)).values(last_used_at=func.now()))
