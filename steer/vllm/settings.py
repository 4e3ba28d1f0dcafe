"""What the processes of one engine send each other through vLLM: the settings, which each process gets in
`additional_config={"steer": {...}}`, and the resolved specs, which the front end sends to the workers in `extra_args`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError, field_validator

from steer.errors import SpecError, UnsupportedModel, problems_of
from steer.names import Site
from steer.settings import ControlSettings, ServeSettings, check_directions_folder
from steer.spec import nearly, parse

#: The key in vLLM's `additional_config`, and in `SamplingParams.extra_args`.
KEY = "steer"
#: The key of a resolved spec; the value is its receipt. Requests must not bring it: only the front end sets it, for
#: versions that it has pinned.
RESOLVED = "steer.resolved"
#: The key of the read-out: the digests of the versions whose rows are read, in this order, and whether their axes are
#: read.
READ = "steer.read"
#: The key of the number of the prompt that a request brings for a measurement in this program. Without a measurement it
#: has no effect.
CAPTURE = "steer.capture"
#: The key of how many tokens of a request's prompt are a prompt, if the other tokens are an answer to be scored.
SCORED = "steer.scored"

#: Settings that only the transformers backend has.
OWN_BACKEND = {"max_requests", "drain", "max_body", "cache_tokens", "cors_origins"}


class EngineSettings(BaseModel, extra="forbid", frozen=True):
    """The settings of an engine. All of them have a default, so `{"steer": {}}` switches steering on."""

    directions: Path | None = Field(
        None, description="folder of direction files; without one, directions come only by PUT"
    )
    default: str = Field("off", description="steering of requests that name none, like 'refusal=0.7'")
    sites: tuple[Site, ...] = Field(("resid_post",), min_length=1, description="where steering acts")
    rows: int = Field(32, ge=1, le=4096, description="direction rows in memory, for all directions together")
    rank: int = Field(1, ge=1, le=64, description="direction rows that one request can use")
    readout: int = Field(0, ge=0, le=1024, description="requests with steer_readout at once; 0 compiles no read-out")
    control: ControlSettings = Field(
        default_factory=ControlSettings,
        description="keys, policy and audit log of the server; also from STEER_…",
    )

    @field_validator("default")
    @classmethod
    def _readable(cls, value: str) -> str:
        parse(value, "default")
        return value

    def check_folder(self) -> None:
        """Raise InvalidInput if the folder of directions cannot be used (`check_directions_folder`)."""
        if self.directions is not None:
            check_directions_folder(self.directions, self.default)

    def graph(self) -> dict[str, object]:
        """The settings that decide what is compiled. Only these are in the key of the compile cache, so that a change
        of other settings does not miss it."""
        return {"sites": list(self.sites), "rows": self.rows, "rank": self.rank, "readout": self.readout}


def read(additional_config: object) -> EngineSettings | None:
    """The settings in vLLM's `additional_config`; None if they do not ask for steering.

    Raises UnsupportedModel with every problem.
    """
    if not isinstance(additional_config, dict) or KEY not in additional_config:
        return None
    try:
        return EngineSettings.model_validate(additional_config[KEY])
    except ValidationError as error:
        problems = problems_of(error, KEY, EngineSettings)
        raise UnsupportedModel(f"additional_config['{KEY}']: {'; '.join(problems)}") from None


def from_serve_settings(settings: ServeSettings, options: Sequence[str]) -> tuple[EngineSettings, list[str]]:
    """The engine's settings for `steer serve --backend vllm`, and the options of `vllm serve`: ours translated, then
    `options`, which take precedence. Raises InvalidInput for a setting in place of which vLLM has its own option."""
    settings.check_unused(OWN_BACKEND)
    model_options = settings.vllm_options
    engine = EngineSettings(
        directions=settings.directions,
        default=settings.default_steer,
        sites=settings.site_list,
        rows=settings.rows,
        rank=settings.rank or 1,
        readout=settings.readout or 0,
        control=settings,
    )
    ours: dict[str, object] = {
        "host": settings.host,
        "port": settings.port,
        "served-model-name": settings.served_model_name,
        "max-model-len": settings.context,
        "chat-template": settings.chat_template,
        "default-chat-template-kwargs": settings.chat_template_kwargs if settings.template_variables else None,
    }
    given = [part for name, value in ours.items() if value is not None for part in (f"--{name}", str(value))]
    return engine, [*model_options, *given, *options]


def check_absent(extra: object, *, served: bool) -> None:
    """Raise SpecError for a request whose `extra_args` have a key that only the front end may write, or a key that is
    nearly `KEY`.

    Args:
        served: whether the request is one to a server. Requests of a Python program may also have the keys of
            measurements and of scoring.
    """
    own = (KEY,) if served else (KEY, CAPTURE, SCORED)
    for key in extra if isinstance(extra, dict) else ():
        if key not in own and isinstance(key, str) and nearly(key):
            raise SpecError(f"'{key[:100]}' is not for requests to set; ask with '{KEY}'", param=key)


def read_by(params: object) -> tuple[Sequence[str], bool]:
    """The digests of what is read for a request with these SamplingParams, none if nothing is read; and whether their
    axes are read."""
    digests, axes = (getattr(params, "extra_args", None) or {}).get(READ, ((), False))
    return digests, axes


def captured_by(params: object) -> int | None:
    """The number of the prompt that a request with these SamplingParams brings for a measurement; None for none."""
    return (getattr(params, "extra_args", None) or {}).get(CAPTURE)


def prompt_of(params: object, length: int) -> int:
    """How many of the `length` prompt tokens of a request with these SamplingParams are a prompt: all of them, unless
    the others are an answer to be scored."""
    asked: int = (getattr(params, "extra_args", None) or {}).get(SCORED, length)
    return min(length, asked)


def receipt_of(params: object) -> str | None:
    """The receipt of the spec in SamplingParams; None for a plain request, and for one that generates nothing."""
    return (getattr(params, "extra_args", None) or {}).get(RESOLVED)
