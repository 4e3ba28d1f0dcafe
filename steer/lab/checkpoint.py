"""The file that an interrupted measurement leaves: its running sums, and how far it came."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from steer.errors import InvalidInput
from steer.lab.activations import Tally
from steer.lab.measurement import load_tensors, save_tensors

log = logging.getLogger("steer")
KEY = "steer_partial"


class State(BaseModel):
    """Prompts done of each class (longest first) and the batch size that memory has allowed so far."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    of: str
    done: dict[str, int]
    batch_size: int | None


class Checkpoint:
    """Saves the `tallies` to `path` at most every `every` seconds. `identity` is everything that decides the numbers:
    sums of another model, set or condition are not added to."""

    def __init__(self, path: Path, identity: object, tallies: Mapping[str, Tally], every: float) -> None:
        self.path, self.tallies, self.every = path, tallies, every
        self.of = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.state = State(of=self.of, done=dict.fromkeys(tallies, 0), batch_size=None)
        self._saved = time.monotonic()

    def resume(self) -> State:
        """Restore the tallies from the file where it is one of the same measurement; how far that had come."""
        if not self.path.exists():
            return self.state
        try:
            metadata, tensors = load_tensors(self.path)
            state = State.model_validate_json(metadata.get(KEY, ""))
        except (InvalidInput, ValidationError) as error:
            log.warning("%s is not the file of an interrupted measurement, beginning anew: %s", self.path, error)
            return self.state
        if state.of != self.of:
            log.warning("%s belongs to another model, set or condition: beginning anew", self.path)
            return self.state
        for name, tally in self.tallies.items():
            tally.restore({key.removeprefix(f"{name}_"): t for key, t in tensors.items() if key.startswith(f"{name}_")})
        log.warning("going on from %s: %s", self.path, ", ".join(f"{n} {c}" for n, c in state.done.items()))
        self.state = state
        return state

    def note(self, name: str, done: int, batch_size: int) -> None:
        """`done` prompts of the class `name` are in its tally."""
        self.state = State(of=self.of, done={**self.state.done, name: done}, batch_size=batch_size)
        if time.monotonic() - self._saved >= self.every:
            self.save()

    def save(self) -> None:
        if not any(self.state.done.values()):
            return
        tensors = {f"{name}_{key}": t for name, tally in self.tallies.items() for key, t in tally.tensors().items()}
        save_tensors(self.path, tensors, {"format": "pt", KEY: self.state.model_dump_json()})
        self._saved = time.monotonic()
