"""Which prompts of two contrast sets a fit measures, and which it tries candidates on. Needs no torch: wrong sets are
told at once."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from steer.errors import InvalidInput
from steer.lab.prompts import PromptSet, check_contrast

log = logging.getLogger("steer")
#: Prompts of each class that candidates are tried on, at most.
TRIED = 32
#: Sets with fewer prompts than this are not split: candidates are tried on what was measured.
SMALL = 32
#: Answers of the plain model that must show the behaviour. Where 7 no longer do and none is new, the chance of that is
#: 1/128, and 4 % among five candidates.
LEAST_SHOWN = 7


@dataclass(frozen=True, slots=True)
class Split:
    """The prompts that are measured, and those that candidates are tried on, of each class."""

    harmful: PromptSet
    harmless: PromptSet
    tried_harmful: PromptSet
    tried_harmless: PromptSet

    @classmethod
    def of(cls, harmful: PromptSet, harmless: PromptSet, limit: int | None = None) -> Split:
        """Draw `limit` different prompts of each (None: take all), and set a quarter of them aside, at most TRIED.
        Where a set is SMALL, all is measured and tried. Raises InvalidInput for sets that share prompts, and for too
        few of them."""
        check_contrast(harmful, harmless)
        harmful, harmless = (
            one.distinct if limit is None else one.distinct.drawn(limit) for one in (harmful, harmless)
        )
        if few := [one for one in (harmful, harmless) if len(one) < LEAST_SHOWN]:
            raise InvalidInput(
                f"{one.name}: has {len(one)} different prompts, a fit needs at least {LEAST_SHOWN} (better 128)"
                for one in few
            )
        if min(len(harmful), len(harmless)) < SMALL:
            log.warning(
                "a set has fewer than %d prompts: candidates are tried on the prompts that they were made from, so "
                "their figures say little about other prompts",
                SMALL,
            )
            return cls(harmful, harmless, harmful, harmless)
        tried = [one.drawn(min(TRIED, len(one) // 4)) for one in (harmful, harmless)]
        return cls(harmful.without(tried[0]), harmless.without(tried[1]), *tried)
