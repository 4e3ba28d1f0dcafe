"""The operator's commands: `steer keys`, `steer audit`, `steer on` and `steer off`."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field

from steer.cli.console import echo_json
from steer.cli.options import check_folder
from steer.errors import InvalidInput, SteerError, printable
from steer.lab.tables import shown

URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "STEER_API_KEY"

_Policy = Annotated[Path, typer.Option("--policy", envvar="STEER_POLICY", help="the policy file")]
_Url = Annotated[str, typer.Option("--url", envvar="STEER_URL", help="the server")]
_Reason = Annotated[str, typer.Option("--reason", help="the reason; refused requests get it in their error")]


def new_key(
    name: Annotated[str, typer.Argument(help="name of the key, for example in the audit log")],
    policy: Annotated[Path | None, "add the key to this policy file; it is created if it does not exist"] = None,
    direction: Annotated[list[str] | None, "a direction that the key may use, '*' for all; repeatable"] = None,
    readout: Annotated[bool, "the key may use steer_readout; the playground colours tokens with it"] = False,
    forms: Annotated[bool, "the key may have answers held to a schema, a grammar or its tools (vLLM)"] = False,
    metrics: Annotated[bool, "the key may read /metrics, as Prometheus does"] = False,
    manage: Annotated[bool, "the key may manage directions and the kill switch"] = False,
) -> None:
    """Make an API key. Its secret is printed once and stored nowhere."""

    from steer.files import write_file
    from steer.serve.policy import PolicyError, fetch, hash_of, new_secret, read

    secret = new_secret()
    head = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
    block = f"[keys.{head}]\nhash = {json.dumps(hash_of(secret))}\n"
    rights = {"readout": readout, "forms": forms, "metrics": metrics, "manage": manage}
    block += f"directions = {json.dumps(direction or [])}\n"
    block += "".join(f"{right} = true\n" for right, has in rights.items() if has)
    try:
        read(block.encode(), "")
    except PolicyError as error:  # its line numbers are left out, because nobody wrote these lines
        problems = (re.sub(r"^:\d+: ", "", problem).removeprefix(f"keys.{name}: ") for problem in error.problems)
        raise InvalidInput(problems) from None
    if policy is None:
        typer.echo(f"# for the policy file\n{block}", err=True)
    else:
        check_folder(policy, "--policy")
        whole, mode = block.encode(), 0o600
        if policy.exists():
            before, mode = fetch(policy), policy.stat().st_mode & 0o777
            with suppress(PolicyError):  # no key yet, or `read` below finds the problem in the whole too
                if name in read(before).keys:
                    raise InvalidInput(f"{policy}: there is a key '{name}'; delete its table, or choose another name")
            # a table may stand anywhere in TOML: the new one is appended, and the rest stays as it is
            whole = b"\n\n".join(filter(None, (before.rstrip(), whole)))
        read(whole, policy.name)
        write_file(policy, whole, mode)
        typer.echo(f"added '{name}' to {policy}", err=True)
    typer.echo(secret)


def list_keys(policy: _Policy, as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """List the keys of a policy file and what each may do."""
    from steer.serve.policy import load
    from steer.spec import text

    found = load(policy).keys
    if as_json:
        echo_json({name: rules.model_dump(mode="json", exclude={"hash"}) for name, rules in found.items()})
        return
    rows = []
    for name, rules in found.items():
        rates = {
            "requests a minute": rules.requests_per_minute,
            "tokens a minute": rules.tokens_per_minute,
            "at once": rules.requests_at_once,
        }
        limit = rules.max_strength
        rights = (rules.steer and rules.directions, rules.readout, rules.metrics or rules.manage, rules.manage)
        rows.append(
            (
                name,
                *("yes" if may else "no" for may in rights),
                ", ".join(rules.directions) or "–",
                limit if isinstance(limit, str) else f"{limit:g}",
                ", ".join(f"{rate:g} {what}" for what, rate in rates.items() if rate is not None) or "–",
                text(rules.default) if rules.default else "–",
                text(rules.required) if rules.required else "–",
            )
        )
    head = ("key", "steer", "read", "metrics", "manage", "directions", "up to", "limits", "default", "required")
    typer.echo(shown(head, rows))


def verify_audit(
    files: Annotated[list[Path], typer.Argument(help="the audit log, or it and its rotated files, in any order")],
    anchor: Annotated[
        list[str] | None, "SEQ:HASH that you kept elsewhere and that must be in the chain; repeatable"
    ] = None,
    from_: Annotated[int, Field(ge=1), "number of the first line, if earlier lines are kept elsewhere"] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Find every line that was edited, removed, added or moved. The exit code is 1 if there is one.

    If one file is given, those that it was rotated to are read too.
    """
    from steer.serve.audit import Head, verify, verify_with_rotated

    try:
        kept = [Head.parse(text) for text in anchor or ()]
        one = len(files) == 1
        report = verify_with_rotated(files[0], kept, from_) if one else verify(files, kept, from_)
    except OSError as error:
        raise InvalidInput(f"{error.filename}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InvalidInput(str(error)) from None
    if as_json:
        summary = {"lines": report.lines, "first": report.first, "last": str(report.last)}
        echo_json(summary | {"problems": report.problems, "notes": report.notes})
    else:
        for problem in report.problems:
            typer.echo(f"problem: {problem}", err=True)
        for note in report.notes:
            typer.echo(f"note: {note}", err=True)
        verdict = "NOT whole" if report.problems else "whole"
        if report.last.seq or not report.problems:  # otherwise no line belongs to a log
            typer.echo(f"{report.lines} lines, {verdict}; the last is {report.last}")
    if report.problems:
        raise typer.Exit(1)


def off(url: _Url = URL, reason: _Reason = "") -> None:
    """Switch steering off: no steered request is admitted until `steer on`. The key comes from STEER_API_KEY."""
    _switch(url, {"enabled": False, "reason": reason})


def on(url: _Url = URL, reason: _Reason = "") -> None:
    """Switch steering on again."""
    _switch(url, {"enabled": True, "reason": reason})


def _switch(url: str, body: dict[str, Any]) -> None:
    url = url if "://" in url else f"http://{url}"
    url = f"{url.rstrip('/').removesuffix('/v1')}/v1/steering"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            state = json.load(answer)
        if not isinstance(state, dict) or not state.keys() >= {"enabled", "running"}:
            raise SteerError(f"{url}: answers, but is no server of Steer")
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError, RecursionError, OSError, HTTPException):  # or its end never came
            message = error.reason
        hint = f" (set {KEY_VARIABLE})" if error.code == 401 else ""
        raise SteerError(f"{url}: {error.code}: {printable(str(message))}{hint}") from None
    except urllib.error.URLError as error:
        raise SteerError(
            f"no server answers at {url} ({getattr(error.reason, 'strerror', None) or error.reason}): start it, or "
            "give the address of yours with --url (STEER_URL)"
        ) from None
    except (OSError, ValueError, HTTPException, RecursionError) as error:
        raise SteerError(f"{url}: {getattr(error, 'reason', error)}") from None
    typer.echo(f"steering is {'on' if state['enabled'] else 'off'}; steered requests still running: {state['running']}")
