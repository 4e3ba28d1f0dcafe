"""A little of the fuzzing on every run; `make fuzz` has the full budgets, with the same inputs first."""

from __future__ import annotations

import pytest

from tests.fuzz import SURFACES
from tests.fuzz.surface import Outcome, Surface, run

INPUTS = 1500


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Python's own, on odd regular expressions
@pytest.mark.parametrize("surface", SURFACES, ids=lambda s: s.name)
def test_what_is_refused_is_refused_by_an_error_of_our_own(surface: Surface) -> None:
    outcome = run(surface, range(INPUTS), Outcome())
    assert not outcome.findings, "\n".join(outcome.findings.values())
    assert sum(outcome.counts.values()) == INPUTS
    assert outcome.counts["refused"] or surface.name == "audits", "the inputs are not all good"
    assert outcome.counts["accepted"], "and not all bad"
