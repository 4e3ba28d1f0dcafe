"""Races: every order of loads, swaps, admissions, ends, preemptions, cancellations and switches, against a plain model.

The registry, the bank, the token index and the gate are the real ones; the model is a few dictionaries.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from steer.direction import Direction, digest
from steer.errors import DirectionError, NoRoom, SpecError, UnknownDirection
from steer.names import MODES, TURNING
from steer.readout import RequestedReadout
from steer.registry import Admission, Registry
from steer.runtime.bank import DirectionBank, HookPoint, gather, operate
from steer.runtime.token_index import PLAIN, TokenIndex
from steer.serve import carriers
from steer.serve.authorise import ANYONE, Refusal, resolve
from steer.serve.control import Control
from steer.spec import RequestedDirection, Spec
from tests import models

ROWS, RANK, TOKENS, RUNNING = 4, 3, 64, 8
#: Those that need no plane.
STRAIGHT = [mode for mode in MODES if mode not in TURNING]
NAMES = ("one", "two", "three")
WHICH = st.integers(0, 99)
MODEL = models.tiny("llama")
POINTS = [HookPoint("resid_post", layer) for layer in range(models.LAYERS)]


@cache
def file(seed: int) -> bytes:
    """Version `seed`: two of the six have two rows."""
    return models.direction(MODEL, k=2 if seed >= 4 else 1, seed=seed).to_bytes()


VERSIONS = {digest(file(seed)): Direction.from_bytes(file(seed)) for seed in range(6)}
BAD = (b"", b"no direction", file(0)[:-7], models.direction(models.tiny("gpt2"), seed=1).to_bytes())


@dataclass(eq=False)
class Request:
    """What the model knows of one request: what it was admitted with, and where it is."""

    admission: Admission
    expected: Spec
    number: int | None = None  # in the index while it runs; None while it waits or is preempted
    pinned: Counter[str] = field(default_factory=Counter)


class Registries(RuleBasedStateMachine):
    @initialize(seeds=st.lists(st.integers(0, 5), min_size=2, max_size=2))
    def start(self, seeds: list[int]) -> None:
        placement = models.placement(ROWS, RANK)
        self.bank = placement.bank
        self.index = TokenIndex(RANK, TOKENS, "cpu")
        self.registry = Registry(placement, patience=0)
        self.control = Control()
        self.names: dict[str, str] = {}
        self.failed: set[str] = set()
        self.alive: list[Request] = []
        self.on = True
        for name, seed in zip(NAMES, seeds, strict=False):
            self.put(name, seed)

    # -- the model -------------------------------------------------------------------------------------------------

    def resident(self) -> set[str]:
        return set(self.names.values()) | {d for request in self.alive for d in request.pinned}

    def rows_used(self) -> int:
        return sum(VERSIONS[d].rank for d in self.resident())

    # -- content ---------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 5))
    def put(self, name: str, seed: int) -> None:
        d = digest(file(seed))
        fits = d in self.resident() or self.rows_used() + VERSIONS[d].rank <= ROWS
        if fits:
            assert self.registry.put(name, file(seed)).digest == d
            self.names[name] = d
            self.failed.discard(name)
        else:
            with pytest.raises(NoRoom):
                self.registry.put(name, file(seed))
            self.refused(name)

    @rule(name=st.sampled_from(NAMES), content=st.sampled_from(BAD))
    def put_what_is_bad(self, name: str, content: bytes) -> None:
        with pytest.raises(DirectionError):
            self.registry.put(name, content)
        self.refused(name)

    def refused(self, name: str) -> None:
        """Of a name that is served it stays known that its newest content is not; of another nothing stays."""
        if name in self.names:
            self.failed.add(name)

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        if name in self.names or name in self.failed:
            self.registry.delete(name)
            self.names.pop(name, None)
            self.failed.discard(name)
        else:
            with pytest.raises(UnknownDirection):
                self.registry.delete(name)

    # -- requests --------------------------------------------------------------------------------------------------

    @rule(draw=st.data(), begins=st.booleans(), reads=st.booleans())
    def admit(self, draw: st.DataObject, begins: bool, reads: bool) -> None:
        known = st.sampled_from([*self.names, *self.names, *NAMES])
        item = st.tuples(known, st.sampled_from(STRAIGHT), st.sampled_from([-1.0, 0.0, 0.5, 1.0]))
        wish = draw.draw(st.lists(item, max_size=3, unique_by=lambda item: item[:2]), "wish")
        read = draw.draw(st.lists(known, min_size=1, max_size=2, unique=True), "read") if reads else None
        carried = carriers.Carried({"body": tuple(RequestedDirection(*item) for item in wish)} if wish else {}, None)
        entries = [(self.names.get(name), mode, strength) for name, mode, strength in wish]
        applied = [(d, mode, strength) for d, mode, strength in entries if strength]
        with self.registry.steady():
            try:
                spec = resolve(carried, self.registry, caller=ANYONE, rules=self.control.rules)
            except UnknownDirection:
                assert None in [d for d, _, _ in entries], "only a name that is not served is unknown"
                return
            except SpecError:
                assert None not in [d for d, _, _ in entries]
                twice = len({(d, mode) for d, mode, _ in entries}) < len(entries)
                assert twice or sum(VERSIONS[d].rank for d, _, _ in applied if d) > RANK
                return
            except Refusal as error:
                assert not self.on, "only the switch refuses here"
                assert error.code.status == 503
                return
            assert None not in [d for d, _, _ in entries]
            assert len({(d, mode) for d, mode, _ in applied}) == len(applied), "no version is applied twice in one mode"
            assert self.on or not applied, "nothing is steered while steering is off"
            assert [(e.digest, e.mode, e.strength) for e in spec.entries] == applied
            reading = None
            if read:
                try:
                    reading = self.registry.resolve_readout(
                        RequestedReadout(tuple(read)), spec, models.LAYERS, ANYONE.may_use
                    )
                except SpecError:
                    asked = [self.names.get(name) for name in read]
                    twice = len(set(asked)) < len(asked)
                    assert None in asked or twice or sum(VERSIONS[d].rank for d in asked if d) > RANK
                    return
            admission = Admission(self.registry, spec, reading)
        request = Request(admission, spec)
        request.pinned.update({entry.digest for entry in spec.entries})
        if reading:
            assert reading.digests == tuple(dict.fromkeys(self.names[name] for name in read or ()))
            request.pinned.update(set(reading.digests) - set(request.pinned))
        self.alive.append(request)
        if begins:
            self.begin(request)

    @precondition(lambda self: self.alive)
    @rule(which=WHICH)
    def resume(self, which: int) -> None:
        """It begins, or comes back after a preemption: its steering is looked up as if it were new."""
        request = self.alive[which % len(self.alive)]
        if request.number is None:
            self.begin(request)

    @precondition(lambda self: self.alive)
    @rule(which=WHICH)
    def preempt(self, which: int) -> None:
        self.stop(self.alive[which % len(self.alive)])

    @precondition(lambda self: self.alive)
    @rule(which=WHICH)
    def end(self, which: int) -> None:
        """It finishes or is cancelled, whether it ran, waited or was preempted; twice is once."""
        request = self.alive[which % len(self.alive)]
        self.finish(request)
        request.admission.release()

    @rule(on=st.sampled_from([True, True, False]), abort=st.booleans())
    def switch(self, on: bool, abort: bool) -> None:
        self.on = on
        self.control.switch(on, ANYONE)
        if not on and abort:
            for request in [r for r in self.alive if r.expected]:
                self.finish(request)

    def begin(self, request: Request) -> None:
        steer = self.bank.steer(request.admission.spec)
        assert (steer is None) == (not request.expected), "a plain request has no row"
        request.number = PLAIN if steer is None else self.index.enter(steer)

    def stop(self, request: Request) -> None:
        if request.number:
            self.index.leave(request.number)
        request.number = None

    def finish(self, request: Request) -> None:
        self.stop(request)
        self.alive.remove(request)
        request.admission.release()

    # -- laws ------------------------------------------------------------------------------------------------------

    @invariant()
    def names_point_to_what_was_put(self) -> None:
        assert self.registry.digests() == self.names
        assert self.registry.failures.keys() == self.failed

    @invariant()
    def no_row_leaks(self) -> None:
        assert self.registry.resident == len(self.resident())
        assert self.registry.rows == self.bank.rows_in_use == self.rows_used()
        pins = Counter(d for request in self.alive for d in request.pinned.elements())
        for version in self.registry.names().values():
            assert version.pins == pins[version.digest]

    @invariant()
    def rows_hold_exactly_their_versions(self) -> None:
        owned: list[int] = []
        for d in self.resident():
            rows = self.bank.rows_of([d]).tolist()
            owned += rows
            for point in POINTS:
                assert torch.equal(self.bank.slices[point].vectors[rows], VERSIONS[d].directions[point.layer])
        assert len(set(owned)) == len(owned)
        assert 0 not in owned, "row 0 is the plain one"
        free = sorted(set(range(ROWS + 1)) - set(owned))
        for point in POINTS:
            assert not self.bank.slices[point].vectors[free].any()

    @invariant()
    def a_pass_gives_each_token_what_its_own_request_asked_for(self) -> None:
        """As its files alone make it; plain tokens keep their bits."""
        running = [r for r in self.alive if r.number is not None][-RUNNING:]
        lengths = [1 + i % 3 for i in range(len(running))]
        steered = self.index.fill(np.array([r.number for r in running], np.int64), np.array(lengths, np.int64))
        assert steered == sum(n for r, n in zip(running, lengths, strict=True) if r.expected)
        total = sum(lengths)
        assert not self.index.packed[total:].any(), "padding is plain"
        x = torch.randn(total, models.D_MODEL, generator=torch.Generator().manual_seed(total))
        for point in POINTS:
            y, _ = operate(x, gather(self.bank.slices[point], *self.index.first(total)))
            begin = 0
            for request, length in zip(running, lengths, strict=True):
                mine = slice(begin, begin + length)
                begin += length
                assert torch.equal(y[mine], alone(x[mine], request.expected, point))

    def teardown(self) -> None:
        for request in list(self.alive):
            self.finish(request)
        for name in list(self.names):
            self.registry.delete(name)
        assert self.bank.rows_in_use == 0
        assert len(self.index._free) == len(self.index._entries) - 1, "every number came back"


def alone(x: torch.Tensor, spec: Spec, point: HookPoint) -> torch.Tensor:
    """`x` under `spec` in a bank that has nothing else."""
    bank = DirectionBank(POINTS, rows=RANK, rank=RANK, d_model=models.D_MODEL)
    for entry in spec.entries:
        bank.load(entry.digest, VERSIONS[entry.digest])
    index = TokenIndex(RANK, TOKENS, "cpu")
    index.fill_with([bank.steer(spec)], [len(x)])
    return operate(x, gather(bank.slices[point], *index.first(len(x))))[0]


def test_every_order_leaves_names_rows_and_requests_as_they_should_be() -> None:
    run_state_machine_as_test(
        Registries,
        settings=settings(
            max_examples=150,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
