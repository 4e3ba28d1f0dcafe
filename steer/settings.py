"""Every option of the server, defined once: its type, default and description. The command line, the environment
variables (`STEER_…`) and the docs are generated from this."""

from __future__ import annotations

import json
import re
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings

from steer.errors import InvalidInput
from steer.files import read_bytes
from steer.names import MAX_RANK, MAX_ROWS, SITES, SUFFIX, Site
from steer.spec import decimal_comma_hint, parse

#: Seconds that an idle connection is kept open: longer than clients do (httpx, and so `openai`: 5), so that the server
#: never closes one just when a client sends a request on it.
KEEP_ALIVE = 65
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


def served_name(model: str) -> str:
    """The default name of MODEL in requests, on both backends: the last part of a folder's path, or the hub id."""
    return Path(model).resolve().name if Path(model).exists() else model


def check_directions_folder(folder: Path, default: str) -> None:
    """Raise InvalidInput if this is not a folder, or does not have the directions of the `default` spec."""
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist; make it or name another"
        raise InvalidInput(f"the directions folder '{folder}' {problem}")
    there = sorted(file.stem for file in folder.glob(f"*{SUFFIX}"))
    InvalidInput.raise_for(
        f"--default-steer: direction '{name}' is not in the folder '{folder}'; there: {', '.join(there) or 'none'}"
        + decimal_comma_hint(name)
        for item in parse(default)
        for name in item.names
        if name not in there
    )


class ControlSettings(BaseSettings, env_prefix="STEER_", extra="forbid"):
    """Who may steer, and what is logged: the same on every backend."""

    policy: Path | None = Field(None, description="policy file (TOML) with keys and rules; the server watches it")
    audit: Path | None = Field(None, description="audit log to write; default: none")
    audit_max_bytes: int = Field(
        64 * 2**20, ge=4096, description="size in bytes at which the audit log begins a new file"
    )
    audit_fsync: Literal["always", "second", "never"] = Field(
        "second",
        description="when the audit log is forced to disk: at each line, once a second, or when the system does it",
    )
    steering: bool = Field(True, description="start with steering on; `steer off` and `steer on` change it later")
    insecure: bool = Field(False, description="serve on any address without keys: everybody may do everything")
    allowed_hosts: str = Field(
        "",
        description="further names that a server without keys accepts as `Host`, besides those of its own machine, "
        "separated by commas, or *",
    )


class ModelOrigin(BaseSettings, env_prefix="STEER_", extra="forbid", protected_namespaces=()):
    """Which model is read, and whether its code may run: for every command that reads a model."""

    revision: str | None = Field(None, description="revision of a hub model")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model; such code can do anything on this machine"
    )


class ModelSettings(ModelOrigin):
    """How a model is loaded: for every command that runs a model."""

    dtype: str = Field("auto", description="float32, bfloat16, float16, or auto: as stored, float32 on a CPU")
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps, or auto")
    device_map: Literal["auto"] | None = Field(
        None,
        description="auto puts the part that does not fit on the GPU into the CPU's memory, and the rest on the disk",
    )
    chat_template: Path | None = Field(
        None, description="Jinja file that renders chats, in place of the model's template or if it has none"
    )

    @field_validator("chat_template")
    @classmethod
    def _is_text(cls, value: Path | None) -> Path | None:
        try:
            if value is not None:
                read_bytes(value).decode()
        except (OSError, UnicodeDecodeError):
            raise ValueError(f"{str(value)!r}: cannot be read as text; accepted: a Jinja template in UTF-8") from None
        return value

    @property
    def loading(self) -> dict[str, Any]:
        """The keywords of `steer.hf.load.load`."""
        return self.model_dump(include=set(ModelSettings.model_fields))

    @property
    def options(self) -> list[str]:
        """The same as options of `steer serve`."""
        given = {name: value for name, value in self.loading.items() if value not in (None, False)}
        named = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
        return [part for name, value in named.items() for part in ([name] if value is True else [name, str(value)])]

    @property
    def vllm_options(self) -> list[str]:
        """The same as options of `vllm serve`. Raises what `check_unused` does."""
        self.check_unused()
        revised = [] if self.revision is None else ["--revision", self.revision]
        return ["--dtype", self.dtype, *revised, *(["--trust-remote-code"] if self.trust_remote_code else [])]

    def check_unused(self, names: Set[str] = frozenset({"device", "device_map"})) -> None:
        """Raise InvalidInput for each of `names` that is set: vLLM has its own options for them."""
        unused = sorted(names & self.model_fields_set)
        InvalidInput.raise_for(f"--{name.replace('_', '-')}: not used by vLLM; use its own option" for name in unused)


class ServeSettings(ControlSettings, ModelSettings):
    backend: Literal["auto", "transformers", "vllm"] = Field(
        "auto", description="auto takes vLLM if it is installed and serves the model, otherwise transformers"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    served_model_name: str | None = Field(
        None, description="name of the model in requests; default: the folder's name, or the hub id"
    )
    directions: Path = Field(Path("directions"), description="folder of direction files; the server watches it")
    default_steer: str = Field(
        "off", description="steering of requests that name none, like 'refusal' or 'refusal=0.7'"
    )
    chat_template_kwargs: str = Field(
        "{}",
        description="variables of the chat template for requests that do not set them, as a JSON object, like "
        '{"enable_thinking": false}',
    )
    sites: str = Field("resid_post", description=f"where steering acts, separated by commas: {', '.join(SITES)}")
    rows: int = Field(32, ge=1, le=MAX_ROWS, description="direction rows in memory, for all directions together")
    rank: int | None = Field(
        None, ge=1, le=MAX_RANK, description="direction rows that one request can use; default: 4, and 1 on vLLM"
    )
    readout: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="how many requests can use steer_readout at once on vLLM, which compiles it in; default: 0",
    )
    max_requests: int = Field(256, ge=1, description="requests that run or wait at once; more get a 429")
    cors_origins: str = Field(
        "", description="origins whose pages may call this server, separated by commas; default: none"
    )
    drain: int = Field(
        300, ge=0, description="seconds that running requests have to end after SIGTERM; then they are aborted"
    )
    max_body: int = Field(8 * 2**20, ge=1024, description="largest request body in bytes; a larger one gets a 413")
    context: int | None = Field(
        None, ge=16, description="the most tokens of prompt and answer together; default: the model's own limit"
    )
    cache_tokens: int | None = Field(None, ge=32, description="the most tokens of all requests in the key-value cache")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="the least severe messages that are logged"
    )

    @field_validator("default_steer")
    @classmethod
    def _readable(cls, value: str) -> str:
        parse(value, "default_steer")
        return value

    @field_validator("sites")
    @classmethod
    def _known(cls, value: str) -> str:
        bad = [site for site in value.split(",") if site.strip() not in SITES]
        if bad:
            raise ValueError(f"{', '.join(bad)}: accepted: {', '.join(SITES)}")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: str) -> str:
        bad = [o for o in value.split(",") if o and o != "*" and not _ORIGIN.fullmatch(o.strip())]
        if bad:
            raise ValueError(
                f"{', '.join(bad)}: accepted: origins like https://example.org or http://localhost:3000, or *"
            )
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_variables(cls, value: str) -> str:
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f'{value!r}: accepted: a JSON object, like {{"enable_thinking": false}}')
        return value

    @property
    def template_variables(self) -> dict[str, object]:
        """`chat_template_kwargs`, parsed."""
        return json.loads(self.chat_template_kwargs)

    @property
    def origins(self) -> list[str]:
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]

    @property
    def site_list(self) -> tuple[Site, ...]:
        given = {site.strip() for site in self.sites.split(",")}
        return tuple(site for site in SITES if site in given)
