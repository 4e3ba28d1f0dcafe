"""Web pages as callers: which pages a server without keys answers, and the content type that a body must have.

A page can send requests to any address, also to one that only this machine reaches. Its browser adds two facts that the
page cannot change: the page's own address (`Origin`), and the name by which it reached this server (`Host`). If a
page's own name was made to point here (DNS rebinding), both have that name.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope

from steer.serve.asgi import with_headers
from steer.serve.errors import Code, HTTPProblem

#: In a list of hosts or origins: all of them.
ANY = "*"
JSON, FILE = "application/json", "application/octet-stream"
#: Methods with which a browser changes nothing.
READING = frozenset({"GET", "HEAD", "OPTIONS"})
#: Of a header that is repeated in an error.
_SHOWN = 100
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]*))(?::\d*)?")


@dataclass(frozen=True, slots=True)
class AllowedOrigins:
    """Which names of this server a request may have in `Host`, besides those of this machine alone, and the origins of
    pages that may call it, besides its own.

    hosts: lower case, without a port; `*` is every name. addresses: may it be called by any IP address, as a server
    can that listens on all of its own? No page's name is one, so none is let in by that.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    addresses: bool = False

    def check(self, headers: Headers) -> None:
        """Raises HTTPProblem: 421 for a name that is not ours, 403 for a page that may not call."""
        host = header(headers, "host")
        if host is not None and not self.is_ours(host):
            raise HTTPProblem(
                Code.HOST_NOT_ALLOWED,
                f"this server has no keys, so it answers only to names of its own machine, not to {host[:_SHOWN]!r}: "
                "add the name to --allowed-hosts (STEER_ALLOWED_HOSTS), or give a policy with keys",
            )
        origin = header(headers, "origin")
        if origin is not None and not {ANY, origin} & self.origins and not _same(origin, host):
            raise foreign(origin)

    def is_ours(self, host: str) -> bool:
        """Is this value of `Host` a name of this server?"""
        name = name_of(host)
        if ANY in self.hosts or name in self.hosts or is_loopback(name):
            return True
        return self.addresses and _address(name) is not None


def foreign(origin: str) -> HTTPProblem:
    """What a page gets that may not call."""
    said = f"pages of {origin[:_SHOWN]!r} may not call this server: the origin is not among its --cors-origins"
    return HTTPProblem(Code.ORIGIN_NOT_ALLOWED, said)


def is_preflight(scope: Scope) -> bool:
    """Does a browser ask here whether a page may call, on the page's behalf and without its key?"""
    return scope.get("method") == "OPTIONS" and "access-control-request-method" in Headers(scope=scope)


def check_kind(scope: Scope, kind: str) -> None:
    """Raise HTTPProblem (415) where the request does not say that its body is `kind`. Any page may send what a form
    sends, or a body without a type, unasked; for every other type its browser asks first."""
    said = (header(Headers(scope=scope), "content-type") or "").partition(";")[0].strip().lower()
    if said == kind or (kind == JSON and said.startswith("application/") and said.endswith("+json")):
        return
    given = repr(said[:_SHOWN]) if said else "none"
    raise HTTPProblem(Code.CONTENT_TYPE, f"this route needs the header 'Content-Type: {kind}' (got {given})")


def plain_json(scope: Scope) -> Scope:
    """The scope of a request whose type `check_kind` takes for JSON, with the type that everybody takes for it; of any
    other as it is."""
    try:
        check_kind(scope, JSON)
    except HTTPProblem:
        return scope
    return with_headers(scope, lambda headers: headers.update({"content-type": JSON}))


def header(headers: Headers, name: str) -> str | None:
    """The value of a header, None where it is not sent. Of one that is sent several times all values, separated by
    commas: a check against known values then fails."""
    return ", ".join(found) if (found := headers.getlist(name)) else None


def hosts_of(text: str) -> frozenset[str]:
    """The names in an option: separated by commas."""
    return frozenset(name_of(part) for part in text.split(",") if part.strip())


def name_of(host: str) -> str:
    """The name or address in a value of `Host`: lower case, without port, brackets and the root's dot."""
    host = host.strip().lower()
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).removesuffix(".") if found else host


def _same(origin: str, host: str | None) -> bool:
    scheme, _, name = origin.lower().partition("://")
    return host is not None and scheme in ("http", "https") and name == host.lower()


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_loopback(host: str | None) -> bool:
    """Can `host` be reached from this machine alone?"""
    if host is None:
        return False
    if host == "localhost":
        return True
    address = _address(host.strip("[]"))
    if address is None:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
