"""The interface of an evaluator, which tries many candidates on a model at once, as rows of one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from steer.direction import Direction
from steer.errors import InvalidInput
from steer.lab.outcome import Answer
from steer.lab.progress import Progress
from steer.lab.prompts import Prompt, PromptSet, Rendering, encode_all
from steer.names import Mode
from steer.shape import Shape
from steer.spec import PHASES, Entry
from steer.tokenization import THINKING, Chat, Thinking, Tokenizer

T = TypeVar("T")
Floats = NDArray[np.float64]
#: A steering in an engine's own form; None is plain.
Steer = Any
#: An engine's plain text along which divergences are taken. Its `first(tokens)` keeps that number of predictions.
Continuation = Any
#: Stands for the thinking of a model that is not loaded yet.
SOME_THINKING = Thinking(-1, -1, frozenset())


@dataclass(frozen=True, slots=True)
class Candidate:
    """A direction and how it is applied. Candidates that share a direction share its rows of the bank.

    Attributes:
        asked: how it is applied; its names are ignored.
        probe: the direction of its condition.
    """

    direction: Direction
    asked: Entry
    probe: Direction | None = None

    @classmethod
    def of(cls, direction: Direction, mode: Mode, strength: float) -> Candidate:
        """A candidate that acts at all tokens and layers."""
        return cls(direction, Entry("", "", mode, strength))

    def asking(self, **changes: Any) -> Self:
        """A copy with these fields of `asked`."""
        return replace(self, asked=replace(self.asked, **changes))

    @property
    def rows(self) -> int:
        """How many rows of the token index it uses."""
        rows = self.direction.rows_in(self.asked.mode) + (self.asked.condition is not None)
        return max(rows, 2) if self.asked.tokens in PHASES else rows

    def entry(self, name: str, probe: str | None = None, thinking: Thinking | None = SOME_THINKING) -> Entry:
        """The entry of a request for it, in which the names are the digests too. `thinking`: the model's. Raises
        SpecError if the direction cannot be applied in this way."""
        entry = replace(self.asked, direction=name, digest=name)
        meta = self.direction.meta
        shape = Shape(
            meta.architecture,
            meta.layers,
            meta.d_model,
            frozenset(meta.sites),
            self.direction.rank,
            thinking=thinking,
        )
        if entry.condition is not None and self.probe is not None:
            called = entry.condition.direction if probe is None else probe
            entry = replace(entry, condition=replace(entry.condition, direction=called, digest=called))
            entry = shape.after_condition(self.probe, entry)
        shape.check_entry(self.direction, entry)
        return entry


def named(
    candidates: Sequence[Candidate], thinking: Thinking | None = SOME_THINKING
) -> tuple[dict[str, Direction], list[Entry]]:
    """The directions of `candidates`, each once under its own name, and for each candidate the entry of a request to a
    model with this thinking."""
    names: dict[int, str] = {}
    directions: dict[str, Direction] = {}

    def name(direction: Direction | None) -> str:
        if direction is None:
            return ""
        found = names.setdefault(id(direction), f"candidate{len(names)}")
        directions[found] = direction
        return found

    entries = [one.entry(name(one.direction), name(one.probe), thinking) for one in candidates]
    return directions, entries


class Evaluator(ABC):
    """A model on which candidates are tried. `steer` is one Steer for all prompts, or a list with one for each.

    Attributes:
        max_tokens: the most tokens of an answer.
        progress: advances with each prompt that was read or answered.
        context: the most tokens of a prompt with its answer.
    """

    context: int

    def __init__(self, chat: Chat, rendering: Rendering | None, max_tokens: int, progress: Progress | None) -> None:
        self.tokenizer, self._chat, self._rendering = chat.tokenizer, chat, rendering
        self.max_tokens, self.progress = max_tokens, progress or Progress()
        self._known: dict[Prompt, list[int]] = {}

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The token ids of each prompt, which is tokenized only once."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]:
            encoded = encode_all(self._chat, new, self._rendering)
            self._known |= {prompt: one.ids for prompt, one in zip(new, encoded, strict=True)}
        return [self._known[prompt] for prompt in prompts]

    def check_room(self, sets: Iterable[PromptSet]) -> None:
        """Raise InvalidInput with every prompt that, with its answer, does not fit the context."""
        InvalidInput.raise_for(
            f"{each.named([prompt])}: has {len(ids)} tokens, and its answer may have {self.max_tokens}; the context is "
            f"{self.context}"
            for each in sets
            for prompt, ids in zip(each.prompts, self._ids(each.prompts), strict=True)
            if len(ids) + self.max_tokens > self.context
        )

    @property
    @abstractmethod
    def rank(self) -> int:
        """How many rows one candidate can use."""

    @property
    @abstractmethod
    def room(self) -> int:
        """How many rows can be resident at once."""

    @abstractmethod
    def resident(self, candidates: Sequence[Candidate]) -> AbstractContextManager[list[Steer]]:
        """Make `candidates` resident on the engine during the block, and give the Steer of each. Raises NoRoom if they
        need more than `room`, SpecError for a phase if the model has no thinking."""

    @abstractmethod
    def answers(
        self, prompts: Sequence[Prompt], steer: Steer, known: Callable[[str], bool] | None = None
    ) -> list[Answer]:
        """Greedy answers of at most `max_tokens` tokens, in the order of `prompts`. An answer may end early if `known`
        is true of its text: then the rest of it would not change the result."""

    @abstractmethod
    def opening_odds(self, prompts: Sequence[Prompt], steer: Steer, tokens: Sequence[int]) -> Floats:
        """log(p) − log(1 − p) for each prompt, p the probability that its answer begins with one of `tokens`."""

    @abstractmethod
    def continuations(self, prompts: Sequence[Prompt], plain: Sequence[Answer] | None = None) -> Sequence[Continuation]:
        """Plain text along which divergences are taken, one for each prompt. `plain`: the plain greedy answers, if they
        are known already."""

    @abstractmethod
    def divergences(self, prompts: Sequence[Prompt], plain: Sequence[Continuation], steer: Steer) -> list[Floats]:
        """For each prompt KL(plain ‖ steered) in nats at each token of its plain text."""

    @abstractmethod
    def log_probabilities(self, sequences: Sequence[Sequence[int]], steer: Steer) -> list[Floats]:
        """The log-probability in nats of each token but the first, `[tokens − 1]`, of each sequence. Raises SpecError
        for a steering that differs between prompt and answer: a sequence has no prompt."""

    def answers_of_each(
        self, prompts: Sequence[Prompt], steers: Sequence[Steer], known: Callable[[str], bool] | None = None
    ) -> list[list[Answer]]:
        """For each of `steers` its answers to all `prompts`, computed in one batch."""
        if not prompts:
            return [[] for _ in steers]
        return [list(part) for part in parts(self.answers(*crossed(prompts, steers), known), len(prompts))]

    def divergences_of_each(
        self, prompts: Sequence[Prompt], plain: Sequence[Continuation], steers: Sequence[Steer]
    ) -> list[list[float]]:
        """For each of `steers` KL(plain ‖ steered) of each prompt, in nats, the mean over the tokens of its plain
        text."""
        if not prompts:
            return [[] for _ in steers]
        asked, rows = crossed(prompts, steers)
        found = self.divergences(asked, [*plain] * len(steers), rows)
        return [[float(row.mean()) for row in part] for part in parts(found, len(prompts))]

    def _opened(self, prompts: Sequence[Sequence[int]]) -> str:
        """The token that begins an answer's thinking, if the chat template has written it; else empty."""
        end = str(self.tokenizer.decode(list(prompts[0][-8:]))).rstrip() if prompts else ""
        return next((begin for begin, _ in THINKING if end.endswith(begin)), "")


#: Makes an evaluator, from the most rows of a direction and the most tokens of an answer.
MakeEvaluator = Callable[[int, int], Evaluator]


def each_row(steer: Steer, count: int) -> list[Steer]:
    """One steering for each of `count` prompts."""
    if isinstance(steer, Sequence) and not isinstance(steer, str):
        assert len(steer) == count, f"{len(steer)} steerings for {count} prompts"
        return list(steer)
    return [steer] * count


def crossed(prompts: Sequence[T], steers: Sequence[Steer]) -> tuple[list[T], list[Steer]]:
    """The prompts and the steerings of a batch in which all `prompts` run with each of `steers`."""
    return [*prompts] * len(steers), [steer for steer in steers for _ in prompts]


def parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` cut into runs of `size`, the last perhaps shorter."""
    return (items[at : at + size] for at in range(0, len(items), size))


def first_tokens(tokenizer: Tokenizer, openings: Sequence[str]) -> list[int]:
    """The first token ids of answers that begin with one of `openings`, with or without a space before it. Raises
    InvalidInput if there are none."""
    found = {
        ids[0]
        for opening in openings
        for text in (opening, f" {opening}")
        if (ids := tokenizer(text, add_special_tokens=False).input_ids)
    }
    blank = {ids[0] for ids in [tokenizer(" ", add_special_tokens=False).input_ids] if ids}
    if not found - blank:
        raise InvalidInput(f"openings: the tokenizer has no tokens for {', '.join(map(repr, openings)) or 'none'}")
    return sorted(found - blank)
