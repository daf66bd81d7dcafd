"""Addresses of clients: whether one is on this machine, and the unit in which clients are counted."""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.types import Scope

_FORWARDING_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")
#: A subscriber of IPv6 usually has a network of this size, with 2^64 addresses.
_IPV6_PREFIX = 64


def is_local(scope: Scope) -> bool:
    """Returns whether the caller is on this machine. Requests that a proxy forwards are not."""
    headers = Headers(scope=scope)
    client = scope.get("client")
    if client is None or any(name in headers for name in _FORWARDING_HEADERS):
        return False
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def counted_address(host: str) -> str:
    """Returns the address that a client's requests are counted under: its own, or its network in IPv6."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _IPV6_PREFIX), strict=False))
