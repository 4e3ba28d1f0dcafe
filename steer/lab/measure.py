"""Measure a model on two contrast sets: run one prefill pass over each prompt and keep sums for every layer."""

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
#: The name of this part in a command's progress.
MEASURING = "measuring"
#: Metadata keys in the file of an interrupted measurement: which measurement it is, and how much of it is done.
KEY, DONE = "steer_partial", "steer_done"


@dataclass(frozen=True, slots=True)
class MeasurementOptions:
    """How prompts become a measurement: everything that it depends on except the model and the prompts.

    Attributes:
        positions: the measured token positions, negative from the prompt's end.
        winsorize: the quantile of its magnitudes to which each vector is clipped; None for no clipping.
        rendering: what surrounds each prompt.
        last_layer: the last measured layer; None is the model's last.
        vectors: whether to keep each prompt's vector (bfloat16) besides the means.
        moments: whether to keep the second moments (float64) besides the means.
    """

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

    Args:
        batch_size: the most prompts of a batch; None lets the source and the memory decide.
        progress: shows what is done.
        partial: a file for the state of an unfinished measurement. It is written on an interruption and after every
            `every` seconds of work. Measuring again with this file continues there and gives the same result. The
            caller removes the file once the measurement is saved.
        every: seconds between two writes of `partial`.

    Raises:
        InvalidInput: the sets share prompts, a prompt does not fit the context or has no such position, the measurement
            does not fit in memory, or activations are not finite.
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
    """Encode the prompts of both sets and check them.

    Args:
        answer: the tokens of an answer that must fit the context together with each prompt.

    Returns:
        The encoded prompts of each set, and the number of BOS tokens with which every prompt begins.

    Raises:
        InvalidInput: the sets share prompts, prompts begin with different numbers of BOS tokens, or prompts do not fit
            the context or lack one of the positions; the message names every such prompt.
    """
    check_contrast(harmful, harmless)
    positions, encoded, problems, bos = options.positions, dict[str, list[Encoded]](), list[str](), set[int]()
    if len(set(positions)) != len(positions):
        problems.append(f"a position is listed twice in {list(positions)}")
    for label, prompts in (("harmful", harmful), ("harmless", harmless)):
        encoded[label] = source.encode(prompts.prompts, options.rendering)
        for prompt, e in zip(prompts.prompts, encoded[label], strict=True):
            bos.add(source.bos_count(e.ids))
            faults = [f", so no position {p}" for p in positions if not -len(e.ids) <= p < len(e.ids)]
            if len(e.ids) + answer > source.context:
                beside = f", and its answer may have {answer}" if answer else ""
                faults.append(f"{beside}; the context is {source.context}")
            problems += [f"{prompts.named([prompt])}: has {len(e.ids)} tokens{fault}" for fault in faults]
    InvalidInput.raise_for(problems)
    if len(bos) != 1:
        raise InvalidInput(f"the chat template gives prompts different numbers of BOS tokens: {sorted(bos)}")
    return encoded, bos.pop()


def _check_room(options: MeasurementOptions, plan: CapturePlan, facts: ModelFacts, prompts: int) -> None:
    """Raise InvalidInput, before anything runs, if the vectors and moments to keep do not fit in memory."""
    each = 2 * len(plan.positions) * plan.layers * facts.d_model
    needed = each * 8 * facts.d_model * options.moments + each * 2 * prompts * options.vectors
    available = psutil.virtual_memory().available
    if needed > available:
        raise InvalidInput(
            f"the measurement needs {needed / 2**30:.0f} GiB of memory, {available / 2**30:.0f} GiB are free: keep "
            "vectors instead of moments, or take fewer positions, prompts or layers"
        )


class ClassSums:
    """The sums of one class of `prompts` prompts.

    If `add` raises InvalidInput, nothing of the batch was added. If `add` is interrupted, the batch may be added in
    part.
    """

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
        """Add the activations of the prompts numbered `indices`.

        Raises:
            InvalidInput: activations are not finite; the message names the layers.
        """
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
        """The statistics of the class, once all its prompts were added."""
        return Statistics(
            mean=self.sums / self.prompts,
            mean_all=self.own / max(self.own_tokens, 1),
            moments=None if self.moments is None else self.moments / self.prompts,
            vectors=self.vectors,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The state that `restore` needs to continue an interrupted measurement."""
        found = {"sums": self.sums, "own": self.own, "moments": self.moments, "vectors": self.vectors}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the state to what `tensors` returned before an interruption."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def _check(self, picked: Tensor, own: Tensor) -> None:
        finite = torch.isfinite(picked).all(-1).all(-1).all(0) & torch.isfinite(own).all(-1)
        if bad := torch.nonzero(~finite).flatten().tolist():
            raise InvalidInput(
                f"{self.name}: activations are not finite at layers {bad}; try --dtype float32 or bfloat16"
            )


class Partial:
    """The state of an unfinished measurement: the `sums` of both classes, and how many prompts are in them.

    The state is saved to `path` (None: not at all), and at most every `every` seconds while prompts run.

    Attributes:
        of: the digest of the measurement's identity.
        done: for each class the number of prompts (longest first) that are in its sums.
        batch_size: the batch size that memory has allowed so far.
        torn: whether a batch is being added that is not in `done` yet. Then nothing is saved, because the sums match no
            number of prompts, and the file that was saved before stays.
    """

    def __init__(self, path: Path | None, sums: Mapping[str, ClassSums], every: float, batch_size: int | None) -> None:
        self.path, self.sums, self.every = path, sums, every
        self.of, self.done, self.batch_size = "", dict.fromkeys(sums, 0), batch_size
        self.torn = False
        self._saved = time.monotonic()

    def resume(self, identity: object) -> None:
        """Restore the sums from the file if it belongs to the same measurement; otherwise start again with a warning.

        Args:
            identity: everything that the sums depend on. The sums of another model, set or condition are not continued.
        """
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
        """Note that `done` prompts of the class `name` are in its sums, and save the state if it is time to."""
        self.done[name], self.batch_size, self.torn = done, batch_size, False
        if time.monotonic() - self._saved >= self.every:
            self.save()

    def save(self) -> None:
        """Write the state to the file, unless there is no file, nothing is done yet, or a batch is added in part."""
        if self.path is None or self.torn or not any(self.done.values()):
            return
        tensors = {f"{name}_{key}": t for name, sums in self.sums.items() for key, t in sums.tensors().items()}
        save_tensors(self.path, tensors, {"format": "pt", KEY: self.of, DONE: json.dumps([self.done, self.batch_size])})
        self._saved = time.monotonic()
