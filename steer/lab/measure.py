"""Measure a model on two contrast sets: one prefill pass over each prompt, from which sums are kept for every layer."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

from steer.errors import InvalidInput
from steer.geometry import winsorise
from steer.lab.measurement import Measurement, MeasurementMeta, ModelFacts, Statistics, load_tensors, save_tensors
from steer.lab.progress import Progress
from steer.lab.prompts import Encoded, PromptSet, Rendering, check_contrast
from steer.lab.source import Activations, CapturePlan, Source, each_batch

log = logging.getLogger("steer")
#: The part of a command's progress.
MEASURING = "measuring"
#: The metadata of a measurement that was interrupted: of which one it is, and how far it had come.
KEY, DONE = "steer_partial", "steer_done"


@dataclass(frozen=True, slots=True)
class MeasurementOptions:
    """How prompts become a measurement; everything that it depends on besides model and prompts. `last_layer` None is
    the model's last. Beside the means `vectors` keeps each prompt's vector (bfloat16), `moments` the second moments
    (float64)."""

    positions: tuple[int, ...] = (-1,)
    winsorize: float | None = None
    rendering: Rendering = field(default_factory=Rendering)
    last_layer: int | None = None
    vectors: bool = False
    moments: bool = False


def measure(
    source: Source,
    harmful: PromptSet,
    harmless: PromptSet,
    options: MeasurementOptions | None = None,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
    partial: Path | None = None,
    every: float = 60.0,
) -> Measurement:
    """Measure both classes under `options`.

    With `partial`, an interruption leaves that file (so does every `every` seconds of work), and measuring again with
    it goes on there with the same result. The caller removes it once the measurement is safe. Raises InvalidInput for
    sets that share prompts, prompts that do not fit the context or have no such position, and activations that are not
    finite.
    """
    options, progress = options or MeasurementOptions(), progress or Progress()
    facts = source.facts
    last = facts.layers - 1 if options.last_layer is None else options.last_layer
    if not 0 <= last < facts.layers:
        raise InvalidInput(f"the last layer {last} does not exist: the model has layers 0 to {facts.layers - 1}")
    plan = CapturePlan(options.positions, last)
    _check_room(options, plan, facts, max(len(harmful), len(harmless)))
    sets = {"harmful": harmful, "harmless": harmless}
    encoded, bos = checked(source, harmful, harmless, options)
    meta = MeasurementMeta(
        model=facts,
        measured=plan.layers,
        positions=options.positions,
        winsorize=options.winsorize,
        **asdict(options.rendering),
        bos_count=bos,
        harmful=harmful.dataset,
        harmless=harmless.dataset,
    )
    sums = {}
    for label, prompts in sets.items():
        own_tokens = sum(e.own.stop - e.own.start for e in encoded[label])
        sums[label] = ClassSums(prompts.name, plan, facts.d_model, len(prompts), own_tokens, options)
    checkpoint = Partial(partial, sums, every, batch_size)
    if partial is not None:
        kept = (options.vectors, options.moments)
        described = meta.model_dump(mode="json", exclude={"created"})
        checkpoint.resume([described, kept, batch_size, source.pass_tokens, source.fingerprint()])
    tokens = source.pass_tokens if batch_size is None else None
    progress.plan(MEASURING, sum(map(len, sets.values())))
    try:
        with progress.part(MEASURING):
            progress.skip(sum(checkpoint.done.values()))
            for label, each in encoded.items():

                def run(indices: list[int], each: list[Encoded] = each, into: ClassSums = sums[label]) -> None:
                    activations = source.run([each[i] for i in indices], plan)
                    checkpoint.torn = True
                    into.add(indices, activations)

                each_batch(
                    [len(e.ids) for e in each],
                    run,
                    batch_size=checkpoint.batch_size,
                    tokens=tokens,
                    progress=progress,
                    longest=source.longest,
                    start=checkpoint.done[label],
                    after=functools.partial(checkpoint.note, label),
                )
    except BaseException:
        checkpoint.save()
        raise
    return Measurement(meta, sums["harmful"].statistics(), sums["harmless"].statistics())


def checked(
    source: Source, harmful: PromptSet, harmless: PromptSet, options: MeasurementOptions, answer: int = 0
) -> tuple[dict[str, list[Encoded]], int]:
    """The encoded prompts of both sets, and the BOS tokens that each begins with. Raises InvalidInput for sets that
    share prompts, and with every prompt that does not fit the context, with `answer` tokens of an answer, or has no
    such position."""
    check_contrast(harmful, harmless)
    positions, encoded, problems, bos = options.positions, dict[str, list[Encoded]](), list[str](), set[int]()
    if len(set(positions)) != len(positions):
        problems.append(f"a position is listed twice in {list(positions)}")
    for label, prompts in (("harmful", harmful), ("harmless", harmless)):
        encoded[label] = source.encode(prompts.prompts, options.rendering)
        for prompt, e in zip(prompts.prompts, encoded[label], strict=True):
            bos.add(source.bos_count(e.ids))
            wrong = [f", so no position {p}" for p in positions if not -len(e.ids) <= p < len(e.ids)]
            if len(e.ids) + answer > source.context:
                beside = f", and its answer may have {answer}" if answer else ""
                wrong.append(f"{beside}; the context is {source.context}")
            problems += [f"{prompts.named([prompt])}: has {len(e.ids)} tokens{said}" for said in wrong]
    InvalidInput.raise_for(problems)
    if len(bos) != 1:
        raise InvalidInput(f"the chat template gives prompts different numbers of BOS tokens: {sorted(bos)}")
    return encoded, bos.pop()


def _check_room(options: MeasurementOptions, plan: CapturePlan, facts: ModelFacts, prompts: int) -> None:
    """Raise InvalidInput where what is to be kept does not fit in memory, before anything runs."""
    each = 2 * len(plan.positions) * plan.layers * facts.d_model
    needed = each * 8 * facts.d_model * options.moments + each * 2 * prompts * options.vectors
    available = psutil.virtual_memory().available
    if needed > available:
        raise InvalidInput(
            f"the measurement needs {needed / 2**30:.0f} GiB of memory, {available / 2**30:.0f} GiB are free: keep "
            "vectors instead of moments, or take fewer positions, prompts or layers"
        )


class ClassSums:
    """The sums of one class of `prompts` prompts. `add` takes a batch whole or, when it raises, not at all; when it is
    interrupted, in part."""

    def __init__(
        self, name: str, plan: CapturePlan, d_model: int, prompts: int, own_tokens: int, options: MeasurementOptions
    ) -> None:
        self.name, self.prompts, self.own_tokens, self.winsor = name, prompts, own_tokens, options.winsorize
        shape = (len(plan.positions), plan.layers)
        self.sums = torch.zeros(*shape, d_model, dtype=torch.float64)
        self.own = torch.zeros(plan.layers, d_model, dtype=torch.float64)
        self.moments = torch.zeros(*shape, d_model, d_model, dtype=torch.float64) if options.moments else None
        self.vectors = torch.zeros(*shape, prompts, d_model, dtype=torch.bfloat16) if options.vectors else None

    def add(self, indices: Sequence[int], activations: Activations) -> None:
        """Add the batch of the prompts numbered `indices`. Raises InvalidInput naming layers that are not finite."""
        picked = activations.picked
        self._check(picked, activations.own)
        rows = picked.double()
        if self.winsor is not None:
            rows = winsorise(rows, self.winsor)
        kept = None if self.vectors is None else rows.to(torch.bfloat16)
        self.sums += rows.sum(2)
        self.own += activations.own
        if self.moments is not None:
            for moments, each in zip(self.moments.flatten(0, 1), rows.flatten(0, 1), strict=True):
                moments.addmm_(each.T, each)
        if kept is not None and self.vectors is not None:
            self.vectors[:, :, list(indices)] = kept

    def statistics(self) -> Statistics:
        return Statistics(
            mean=self.sums / self.prompts,
            mean_all=self.own / max(self.own_tokens, 1),
            moments=None if self.moments is None else self.moments / self.prompts,
            vectors=self.vectors,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The state: what `restore` needs to go on as if nothing had happened."""
        found = {"sums": self.sums, "own": self.own, "moments": self.moments, "vectors": self.vectors}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def _check(self, picked: Tensor, own: Tensor) -> None:
        finite = torch.isfinite(picked).all(-1).all(-1).all(0) & torch.isfinite(own).all(-1)
        if bad := torch.nonzero(~finite).flatten().tolist():
            raise InvalidInput(
                f"{self.name}: activations are not finite at layers {bad}; try --dtype float32 or bfloat16"
            )


class Partial:
    """How far the `sums` of both classes have come, saved to `path` (None: nowhere) at most every `every` seconds.
    `done`: the prompts of each class (longest first) that are in its sums; `batch_size`: what memory has allowed so
    far; `torn`: a batch is being added that is not noted yet, so that the sums are of no number of prompts. Then
    nothing is saved, and what was saved before stays."""

    def __init__(self, path: Path | None, sums: Mapping[str, ClassSums], every: float, batch_size: int | None) -> None:
        self.path, self.sums, self.every = path, sums, every
        self.of, self.done, self.batch_size = "", dict.fromkeys(sums, 0), batch_size
        self.torn = False
        self._saved = time.monotonic()

    def resume(self, identity: object) -> None:
        """Restore the sums from the file where it is one of the same measurement. `identity` is everything that decides
        the numbers: sums of another model, set or condition are not added to."""
        self.of = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        if self.path is None or not self.path.exists():
            return
        try:
            metadata, tensors = load_tensors(self.path)
        except InvalidInput as error:
            log.warning("%s is not the file of an interrupted measurement, starting again: %s", self.path, error)
            return
        if metadata.get(KEY) != self.of:
            log.warning("%s belongs to another model, set or condition: starting again", self.path)
            return
        for name, sums in self.sums.items():
            sums.restore({key.removeprefix(f"{name}_"): t for key, t in tensors.items() if key.startswith(f"{name}_")})
        self.done, self.batch_size = json.loads(metadata[DONE])
        log.warning("going on from %s: %s", self.path, ", ".join(f"{n} {c}" for n, c in self.done.items()))

    def note(self, name: str, done: int, batch_size: int) -> None:
        """`done` prompts of the class `name` are in its sums."""
        self.done[name], self.batch_size, self.torn = done, batch_size, False
        if time.monotonic() - self._saved >= self.every:
            self.save()

    def save(self) -> None:
        if self.path is None or self.torn or not any(self.done.values()):
            return
        tensors = {f"{name}_{key}": t for name, sums in self.sums.items() for key, t in sums.tensors().items()}
        save_tensors(self.path, tensors, {"format": "pt", KEY: self.of, DONE: json.dumps([self.done, self.batch_size])})
        self._saved = time.monotonic()
