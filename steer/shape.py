"""The shape of a served model and its steering, and whether a direction and a request's entry fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from steer.direction import Direction, check_fits
from steer.errors import DirectionError, SpecError, noted
from steer.names import (
    MAX_STRENGTH,
    SHIFTING,
    SITE_RULES,
    SITES,
    TURNING,
    Mode,
    Site,
    acts_on_terms,
    readable,
    site_problem,
)
from steer.spec import PHASES, TOKENS, Entry, layer_range
from steer.tokenization import THINKING, Thinking


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape that a direction must fit.

    Attributes:
        sites: at which steering is attached.
        rank: rows for each token.
        dtype: of the stream.
        thinking: the tokens of the model's thinking; None if none are known.
    """

    architecture: str
    layers: int
    d_model: int
    sites: frozenset[Site]
    rank: int
    dtype: torch.dtype = torch.float32
    thinking: Thinking | None = None

    @property
    def tokens(self) -> dict[str, str]:
        """Those of `TOKENS` at which an entry can act."""
        phases = PHASES if self.thinking is None or self.rank == 1 else ()
        return {tokens: meaning for tokens, meaning in TOKENS.items() if tokens not in phases}

    def check(self, direction: Direction) -> None:
        """Raise DirectionError with every reason why this model cannot serve `direction`."""
        problems: list[str] = []
        with noted(problems):
            check_fits(direction, d_model=self.d_model, layers=self.layers, architecture=self.architecture)
        if missing := sorted(set(direction.meta.sites) - self.sites):
            problems.append(
                f"it acts at the sites {missing}, steering was started for {sorted(self.sites)}: `--sites "
                f"{','.join(sorted(self.sites | set(missing)))}` for a server, `sites=` in Python"
            )
        if direction.rank > self.rank:
            problems.append(
                f"it has {direction.rank} rows for each layer, steering was started for {self.rank}: `--rank "
                f"{direction.rank}` for a server, `rank=` in Python"
            )
        if (growth := _growth(direction)) > torch.finfo(self.dtype).max:
            name, largest = max(
                ((name, float(t.abs().max())) for name, t in direction.tensors().items() if name.endswith("weights")),
                key=lambda pair: pair[1],
            )
            problems.append(
                f"tensor '{name}' goes up to {largest:.3g}: at strength {MAX_STRENGTH:g} all layers together make a "
                f"component {growth:.3g} times larger, more than {str(self.dtype).removeprefix('torch.')} can hold; "
                "weights from -2 to 2 are always accepted"
            )
        DirectionError.raise_for(problems)

    def after_condition(self, probe: Direction, entry: Entry) -> Entry:
        """`entry` with the layers at which it acts under its condition: all layers after the condition's, if it names
        none. Raises SpecError with every reason why the condition, on the direction `probe`, cannot be decided before
        these layers."""
        condition = entry.condition
        assert condition is not None
        layer, last = condition.layer, self.layers - 1
        problems: list[str] = []
        if probe.rank != 1:
            problems.append(f"its direction has {probe.rank} rows for each layer: a direction of one row is accepted")
        if not readable(probe.meta.sites):
            sites = ", ".join(f"'{site}'" for site in SITES if SITE_RULES[site].readable)
            problems.append(f"its direction acts at the sites {', '.join(probe.meta.sites)}: what is read is {sites}")
        if layer >= last:
            problems.append(
                f"the model has the layers 0 to {last}, of which one must come after it: 0 to {last - 1} are accepted"
            )
        elif not probe.directions[layer].any():
            problems.append("its direction has no row at that layer")
        elif entry.layers is not None and entry.range[0] <= layer:
            problems.append(
                f"it is decided at the output of layer {layer}, and '{entry.direction}' is to act at the layers "
                f"{entry.layers}: layers from {layer + 1} on are accepted"
            )
        SpecError.raise_for((f"the condition {condition}: {problem}" for problem in problems), "steer.if")
        return entry if entry.layers else replace(entry, layers=layer_range(f"{layer + 1}-{last}"))

    def check_entry(self, direction: Direction, entry: Entry) -> None:
        """Raise SpecError if `direction` cannot be applied as `entry` says."""
        check_mode(direction, entry.mode, entry.direction)
        if entry.shift is not None:
            _check_shift(direction, entry)
        if entry.norm_preserving:
            _check_norm(direction, entry)
        if entry.tokens in PHASES and self.thinking is None:
            known = ", ".join(f"{begin} and {end}" for begin, end in THINKING[:2])
            raise SpecError(
                f"tokens: '{entry.tokens}': no tokenizer here has tokens that begin and end a thinking, such as "
                f"{known}",
                param="steer.tokens",
            )
        if entry.layers is None:
            return
        first, last = entry.range
        if last >= self.layers:
            raise SpecError(
                f"direction '{entry.direction}': the model has the layers 0 to {self.layers - 1}, not all of "
                f"{entry.layers}",
                param="steer.layers",
            )
        if not direction.acts_in(entry.mode)[first : last + 1].any():
            raise SpecError(
                f"direction '{entry.direction}' does nothing at the layers {entry.layers}", param="steer.layers"
            )


_PLANE = "plane (of one row, at the site 'resid_post', as `steer derive` writes it)"
#: What a file lacks if it does not have the mode.
LACKING: Mapping[Mode, str] = {
    "ablate": "weights at other layers than the one where it adds",
    "add": "class means that differ",
    "affine": "mean of harmless text at every layer",
    "clamp": "class means that differ",
    "one_sided": "threshold between class means that differ",
    "rotate": _PLANE,
    "rotate_one_sided": f"{_PLANE} with a threshold",
}


def check_mode(direction: Direction, mode: Mode, name: str) -> None:
    """Raise SpecError if `mode` is not defined at this direction's sites, or its file lacks what the mode needs."""
    if not all(mode in SITE_RULES[site].modes for site in direction.meta.sites):
        raise SpecError(f"direction '{name}': {site_problem(direction.meta.sites, mode)}", param="steer.mode")
    modes = direction.meta.modes
    if (mode == "clamp" and not direction.contrasted(each=True)) or (
        mode == "add" and not direction.acts_in(mode).any()
    ):
        modes = tuple(other for other in modes if other != mode)
    if mode not in modes:
        raise SpecError(
            f"direction '{name}' holds no {LACKING[mode]} for the mode '{mode}'; its modes: {', '.join(modes)}",
            param="steer.mode",
        )


def _check_shift(direction: Direction, entry: Entry) -> None:
    problem = None
    if entry.mode not in SHIFTING:
        problem = f"the mode '{entry.mode}' has no threshold to shift; modes with one: {', '.join(SHIFTING)}"
    elif not direction.contrasted():
        problem = "holds no class means for some layer, so no distance to shift a threshold by"
    if problem:
        raise SpecError(f"direction '{entry.direction}': {problem}", param="steer.shift")


def _check_norm(direction: Direction, entry: Entry) -> None:
    problem = None
    if entry.mode in TURNING:
        problem = f"the mode '{entry.mode}' always keeps the norm of the stream; leave it out"
    elif acts_on_terms(direction.meta.sites):
        problem = f"it acts at the sites {', '.join(direction.meta.sites)}, and only the norm of a whole stream is kept"
    if problem:
        raise SpecError(f"direction '{entry.direction}': norm_preserving: {problem}", param="steer.norm_preserving")


def _growth(direction: Direction) -> float:
    """A lower bound on how many times larger all layers together can make a component: max(1, |w| − 1) for each layer
    at strength 1, with either sign, times the largest strength in one of them."""
    weights = direction.weight_sizes.double()[direction.directions.flatten(1).any(1)]
    return float(MAX_STRENGTH * (weights - 1).clamp_min(1).prod())
