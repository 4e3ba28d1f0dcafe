"""What the routes of the own engine share: the model, its engine, registry and control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fastapi import Request

from steer._version import __version__
from steer.admission import Admission
from steer.hf.engine import Engine
from steer.hf.load import Loaded
from steer.hf.sampling import Token
from steer.readout import FIELD, Readout
from steer.registry import Registry
from steer.runtime.token_index import RequestSteer
from steer.serve import errors
from steer.serve.answers import SteerFields, report
from steer.serve.carriers import PLUS
from steer.serve.control import Control
from steer.serve.generation import Generator
from steer.serve.text import token_text
from steer.spec import RequestedDirection


@dataclass(frozen=True)
class Served:
    model_name: str
    loaded: Loaded
    engine: Engine
    registry: Registry
    default: tuple[RequestedDirection, ...] = ()
    max_body: int = 8 * 2**20
    control: Control = field(default_factory=Control)
    template: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def generator(self) -> Generator:
        return Generator(self.loaded, self.engine)

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of every answer: what this server's answers depend on besides the request."""
        return f"steer-{__version__}-{(self.loaded.template_sha256 or 'base')[:8]}"

    def check_model(self, name: str) -> None:
        """Raise HTTPProblem 404 for a model that is not this one; the middleware has taken aliases apart."""
        if name != self.model_name:
            raise errors.HTTPProblem(
                errors.Code.MODEL_NOT_FOUND,
                f"the model {name[:100]!r} is not served here; served: '{self.model_name}', and "
                f"'{self.model_name}{PLUS}<direction>' for each direction",
                param="model",
            )

    def admitted(self, request: Request) -> Admission:
        """As the middleware admitted it."""
        admission: Admission = request.scope["steer"]
        return admission

    def steer(self, admission: Admission, prompt: Sequence[int]) -> RequestSteer | None:
        """What steers a prompt of these tokens, in slots of the bank."""
        spec = admission.spec
        return self.engine.steering.bank.steer(spec, len(prompt), spec.phase(self.loaded.thinking, prompt))

    def steer_fields(self, read: Readout | None, tokens: list[Token], applied: bool | None) -> SteerFields:
        """The parts of a choice that say what was read at its tokens, and whether its condition held, or its phase
        came."""
        out: SteerFields = {}
        if applied is not None:
            out["steer_applied"] = applied
        if read is not None:
            shown = [(token_text(self.loaded.tokenizer, token.id), token.reading) for token in tokens]
            out[FIELD] = report(read, shown)
        return out
