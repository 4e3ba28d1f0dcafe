"""Web pages as callers: which pages a server without keys answers, and the content type that a body must have.

A page can send requests to any address that its browser can reach, also to this machine's own. The browser adds two
headers that the page cannot change: the page's address (`Origin`), and the name by which it reached this server
(`Host`). If a foreign name was made to point here (DNS rebinding), both headers have that name.
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
#: Methods that change nothing.
READING = frozenset({"GET", "HEAD", "OPTIONS"})
#: Characters of a header that an error repeats.
_SHOWN = 100
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]*))(?::\d*)?")


@dataclass(frozen=True, slots=True)
class AllowedOrigins:
    """The values of `Host` and `Origin` that a server without keys accepts, besides names of this machine and its own
    pages.

    Attributes:
        hosts: further names of this server, in lower case and without a port; `*` is every name.
        origins: of other servers' pages that may call.
        addresses: whether `Host` may be any IP address, for a server that listens on all interfaces. This lets in no
            page by DNS rebinding, which needs a name.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    addresses: bool = False

    def check(self, headers: Headers) -> None:
        """Raises HTTPProblem: 421 for a name that is not this server's, 403 for a page that may not call."""
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
        """Whether this value of `Host` is a name of this server."""
        name = name_of(host)
        if ANY in self.hosts or name in self.hosts or is_loopback(name):
            return True
        return self.addresses and _address(name) is not None


def foreign(origin: str) -> HTTPProblem:
    """The error of a page that may not call."""
    message = f"pages of {origin[:_SHOWN]!r} may not call this server: the origin is not among its --cors-origins"
    return HTTPProblem(Code.ORIGIN_NOT_ALLOWED, message)


def is_preflight(scope: Scope) -> bool:
    """Whether this is a browser's question if a page may call; it is asked without the page's key."""
    return scope.get("method") == "OPTIONS" and "access-control-request-method" in Headers(scope=scope)


def check_kind(scope: Scope, kind: str) -> None:
    """Raise HTTPProblem (415) unless the request's content type is `kind`. A page may send a form's content types, or a
    body without a type, to any server; for all other types its browser sends a preflight request first."""
    sent = (header(Headers(scope=scope), "content-type") or "").partition(";")[0].strip().lower()
    if sent == kind or (kind == JSON and sent.startswith("application/") and sent.endswith("+json")):
        return
    given = repr(sent[:_SHOWN]) if sent else "none"
    raise HTTPProblem(Code.CONTENT_TYPE, f"this route needs the header 'Content-Type: {kind}' (got {given})")


def plain_json(scope: Scope) -> Scope:
    """The scope with the content type `application/json`, if `check_kind` accepts its content type as JSON; unchanged
    if not."""
    try:
        check_kind(scope, JSON)
    except HTTPProblem:
        return scope
    return with_headers(scope, lambda headers: headers.update({"content-type": JSON}))


def header(headers: Headers, name: str) -> str | None:
    """The value of a header, or None. If it was sent several times, all values, separated by commas, so that a check
    against known values fails."""
    return ", ".join(found) if (found := headers.getlist(name)) else None


def hosts_of(text: str) -> frozenset[str]:
    """The names in an option, where commas separate them."""
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
    """Whether `host` can be reached only from this machine."""
    if host is None:
        return False
    if host == "localhost":
        return True
    address = _address(host.strip("[]"))
    if address is None:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
