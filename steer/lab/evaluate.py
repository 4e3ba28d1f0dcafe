"""What a direction does to a model: the behaviour before and after, divergence on harmless text, lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steer.direction import Direction, Mode
from steer.lab.behaviour import REFUSAL
from steer.lab.probe import Answered, Divergence, Probe
from steer.lab.prompts import Prompt
from steer.lab.statistics import wilson


def evaluate(
    probe: Probe, direction: Direction, mode: Mode, strength: float, sets: Mapping[str, Sequence[Prompt]], kl_set: str
) -> dict[str, Any]:
    """Refusals plain and steered on each of `sets`, lengths of answers, and the divergence on `kl_set`."""
    report: dict[str, Any] = {"mode": mode, "strength": strength, "max_tokens": probe.max_tokens, "sets": {}}
    with probe.resident(direction, mode, strength) as steer:
        for name, prompts in sets.items():
            plain = probe.answers(prompts, None, f"{name}, plain")
            steered = probe.answers(prompts, steer, f"{name}, steered")
            report["sets"][name] = {"plain": _arm(plain), "steered": _arm(steered)}
            if name == kl_set:
                divergence = probe.divergence(prompts, plain, steer, f"{name}, divergence")
                report["kl"] = {field: getattr(divergence, field) for field in Divergence.__slots__}
    return report


def _arm(answers: Sequence[Answered]) -> dict[str, Any]:
    hits, lengths = sum(REFUSAL.shown(a.text) for a in answers), [len(a.ids) for a in answers]
    return {
        "prompts": len(answers),
        "refused": hits,
        "rate": hits / len(answers),
        "interval": list(wilson(hits, len(answers))),
        "tokens_mean": float(np.mean(lengths)),
        "tokens_median": float(np.median(lengths)),
        "empty": sum(not a.text.strip() for a in answers),
    }
