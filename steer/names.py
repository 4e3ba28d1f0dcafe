"""The words that files, requests and policies share: modes, hook points and the names of directions. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from typing_extensions import TypedDict

from steer.errors import DirectionError, brief

Mode = Literal["ablate", "add", "affine", "clamp", "one_sided", "rotate", "rotate_one_sided"]
Site = Literal["resid_post", "writers"]
MODES: tuple[Mode, ...] = get_args(Mode)
#: The modes that turn the stream in the plane of the file's direction and its axis, so they use two rows.
TURNING: tuple[Mode, ...] = ("rotate", "rotate_one_sided")
assert MODES[-len(TURNING) :] == TURNING, "`token_index.turns` tells them by their place"
#: The modes that have a threshold, which a request may shift.
SHIFTING: tuple[Mode, ...] = ("clamp", "one_sided", "rotate_one_sided")
#: The modes whose effect along −v differs from their effect along v.
SIGNED: tuple[Mode, ...] = ("add", "one_sided", "rotate_one_sided")
#: What each mode does, in one sentence, for people who choose a mode.
MODE_SUMMARIES: dict[Mode, str] = {
    "ablate": "The component along the direction goes.",
    "add": "The difference of the class means, times the strength, is added.",
    "affine": "The component is set to the mean of harmless text.",
    "clamp": "The component is kept between those of the class means.",
    "one_sided": "What is above the reference, on the behaviour's side, is set to the target.",
    "rotate": "The stream is turned until nothing of it lies along the direction, and keeps its length.",
    "rotate_one_sided": "The same, where the stream leans further to the behaviour's side than the reference.",
}


class Scale(TypedDict):
    """Strengths worth trying in a mode, which a slider offers; more are accepted."""

    low: float
    high: float
    means: str


#: The scale of each mode. `means` explains the strengths to people who move the slider.
MODE_SCALES: dict[Mode, Scale] = {
    "ablate": {"low": -1, "high": 2, "means": "1 removes all of it, more turns it round; below 0 it grows."},
    "add": {"low": -2, "high": 2, "means": "Above 0 towards the behaviour, below 0 away from it."},
    "affine": {"low": 0, "high": 2, "means": "1 goes all the way there, less a part of it, more beyond."},
    "clamp": {"low": 0, "high": 2, "means": "1 goes all the way there, less a part of it, more beyond."},
    "one_sided": {"low": 0, "high": 3, "means": "1 goes all the way there, less a part of it, more beyond."},
    "rotate": {"low": 0, "high": 2, "means": "The share of the angle: 1 is all of it, more turns beyond."},
    "rotate_one_sided": {"low": 0, "high": 2, "means": "The share of the angle: 1 is all of it, more turns beyond."},
}
#: The metadata key of a measurement file, which is not a direction yet.
MEASUREMENT_KEY = "steer_measurement"
SITES: tuple[Site, ...] = get_args(Site)


@dataclass(frozen=True, slots=True)
class SiteRules:
    """What can be done at a site.

    Attributes:
        modes: the modes that are defined at the site. All modes but `ablate` need values of the whole stream.
        whole: whether the vector at the site is a token's whole stream; otherwise it is one term that is added to it.
        readable: whether a read-out can be taken at the site. At most one site of each layer is readable.
    """

    modes: tuple[Mode, ...]
    whole: bool
    readable: bool


#: The rules of each site. Each backend finds for itself which modules of a model belong to a site.
SITE_RULES: Mapping[Site, SiteRules] = {
    "resid_post": SiteRules(modes=MODES, whole=True, readable=True),
    "writers": SiteRules(modes=("ablate",), whole=False, readable=False),
}


def readable(sites: Iterable[Site]) -> bool:
    """Whether a read-out can be taken at one of `sites`."""
    return any(SITE_RULES[site].readable for site in sites)


def acts_on_terms(sites: Iterable[Site]) -> bool:
    """Whether the vector at one of `sites` is a term that is added to the stream; the embedding is such a term too."""
    return not all(SITE_RULES[site].whole for site in sites)


def site_problem(sites: Iterable[Site], mode: Mode) -> str | None:
    """What is wrong with `mode` at `sites`; None if the mode is defined at all of them."""
    for site in sites:
        if mode not in (modes := SITE_RULES[site].modes):
            only = f"the mode '{modes[0]}' is" if len(modes) == 1 else f"the modes {', '.join(modes)} are"
            return f"at the site '{site}' only {only} defined, not '{mode}'"
    return None


#: Largest magnitude of a strength. 1 is full removal, so a strength above this limit is a mistake.
MAX_STRENGTH = 10.0
#: Largest shift of a threshold; the unit is the distance between the class means.
MAX_SHIFT = 2.0

#: Most direction rows that can be resident at once, and most of these rows that can act on one token.
MAX_ROWS, MAX_RANK = 4096, 64

#: The suffix of direction files.
SUFFIX = ".safetensors"
#: The suffixes of other tools' directions, which `steer convert` reads: the pickled formats, and all formats.
PICKLED_SUFFIXES = (".pt", ".pth", ".refuse", ".bin")
OTHER_SUFFIXES = (".gguf", *PICKLED_SUFFIXES)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = {"off", "none", "null", "false", "true"}


def check_name(name: str) -> str:
    """Return `name` if a direction may have this name, which goes into file names, model names and headers.

    Raises:
        DirectionError: the name is not acceptable.
    """
    named = isinstance(name, str) and _NAME.fullmatch(name) and name.lower() not in _RESERVED
    if not named or name.endswith(SUFFIX):
        without = f"; without the suffix of its file: '{name.removesuffix(SUFFIX)}'" if named else ""
        raise DirectionError(
            f"direction name {brief(name, python=True)} is not acceptable: 1 to 64 of a to z, A to Z, 0 to 9, '.', '_' "
            f"and '-', beginning with a letter or digit, and none of {', '.join(sorted(_RESERVED))}{without}",
            param="name",
        )
    return name
