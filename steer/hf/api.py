"""The Python API: steer `model.generate` and forward passes of a loaded model, without a server."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from steer import readout
from steer.direction import Direction, read_file
from steer.errors import DirectionError, InvalidInput, SpecError, UnsupportedModel, brief, noted
from steer.hf.internals import Call
from steer.hf.load import check_causal
from steer.hf.steering import Steering
from steer.names import MAX_RANK, MAX_ROWS, SITES, Site, check_name
from steer.readout import Line
from steer.registry import Admission, Registry
from steer.runtime.readout import Reading, Recorder
from steer.spec import OFF_TEXTS, Spec, parse

if TYPE_CHECKING:
    from transformers import Pipeline

#: A direction, or the path of its file.
DirectionLike: TypeAlias = "str | os.PathLike[str] | Direction"
#: The steering of a row, in the request language: `"refusal=0.7"`, `{"direction": "refusal"}`, a list of these, None.
SpecLike: TypeAlias = "str | Mapping[str, object] | Sequence[str | Mapping[str, object]] | bool | None"


def attach(
    model: nn.Module | Pipeline,
    directions: Mapping[str, DirectionLike] | None = None,
    *,
    sites: Sequence[Site] = ("resid_post",),
    rows: int = 32,
    rank: int = 4,
) -> Attached:
    """Attach steering to a loaded transformers model, until `detach`.

        steering = steer.attach(model, {"refusal": "directions/refusal.safetensors"})

        model.generate(**inputs)                          # plain
        with steering("refusal=0.7"):                     # every row of every pass of the model
            model.generate(**inputs)
        with steering("off", "refusal"):                  # the first half of the rows plain, the second half steered
            model.generate(**inputs)
        with steering.read("refusal") as reading:         # read components of the stream, steered or not
            model(**inputs)

        steering.detach()

    `with steer.attach(...) as steering:` detaches at the end of the block.

    Before it returns, probe passes show that every hook acts and that a plain pass is unchanged. It clears what
    `torch.compile` has compiled in this process (`torch.compiler.reset`), which would run without the hooks.

    Args:
        model: a causal language model of transformers, or a wrapper of one: a pipeline, `torch.compile`, PEFT (its
            adapters stay active). Call it as before; `attach` changes no weights.
        directions: by the names for specs, each a `Direction` or the path of its file. `load` and `unload` change them
            later.
        sites: where the hooks act: "resid_post" (every block's output), "writers" (the outputs of attention, MLP and
            embedding). A direction's file says which it needs.
        rows: how many direction rows can be resident. A direction of rank k needs k, and one more if its file has a
            plane and `rank` is above 1.
        rank: how many rows can act on one token: the sum of the ranks of all directions of one spec.

    Raises:
        InvalidInput: for the arguments.
        DirectionError: with all problems of all files that do not fit the model.
        NoRoom: the directions need more than `rows`.
        UnsupportedModel: the model cannot be steered and checked.
        RuntimeError: a block of another steering of the model is open.
    """
    _check_arguments(directions, sites, rows, rank)
    loaded = _read(directions or {})
    return Attached(_inner(model), loaded, sites=tuple(sites), rows=rows, rank=rank)


class Attached:
    """The hooks on one model, made by `steer.attach`, with the directions that they can apply.

    Outside a `with steering(...)` block the model is plain, bit for bit. Two steerings of one model act one after the
    other, in the order in which they were attached. A steering without references is detached.
    """

    def __init__(
        self, model: nn.Module, directions: Mapping[str, bytes], *, sites: tuple[Site, ...], rows: int, rank: int
    ) -> None:
        self._steering = Steering(model, sites=sites, rows=rows, rank=rank)
        if not self._steering.passes:
            raise UnsupportedModel(
                f"{type(model).__name__}: its decoder {type(self._steering.anatomy.decoder).__name__} is not called "
                "when the model is, so that no pass would be noticed"
            )
        self._steering.warns_of_stale_caches = True
        self._registry = Registry(self._steering.placement(), quiet=True)
        self._load(directions)
        self._attach()
        # a notebook's cell that attaches, and is run again, drops the first steering
        weakref.finalize(self, self._steering.detach).atexit = False

    @property
    def attached(self) -> bool:
        return self._steering.attached

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._steering.sites

    @property
    def directions(self) -> dict[str, Direction]:
        """The directions by name."""
        return {name: version.direction for name, version in self._registry.names().items()}

    def load(self, name: str, direction: DirectionLike) -> None:
        """Use `direction` under `name` from now on, in place of an earlier one. An open block keeps the earlier one.
        Raises DirectionError or NoRoom; then nothing has changed."""
        self._load(_read({name: direction}))

    def unload(self, name: str) -> None:
        """Remove the direction `name`. Raises UnknownDirection, or DirectionError for an invalid name."""
        self._registry.delete(check_name(name))

    def __call__(self, *specs: SpecLike) -> Steered:
        """`with steering(spec):` steers every row of every pass of the model in the block.

        Several specs divide the rows of a pass into equal groups, in order. So with one spec for each prompt, beams and
        `num_return_sequences` follow their prompt. A pass whose rows are not a multiple of the specs raises
        InvalidInput. Blocks nest: only the inner one is in force until it ends.

        The end of the block raises NotFinite if steering would have taken a row out of the range of the model's dtype:
        the output of that row is not an answer.

        Raises SpecError or UnknownDirection for a spec that cannot be applied, RuntimeError when detached. Without
        `with` the returned object does nothing, so the next pass of the model raises.
        """
        self._check_attached()
        if not specs:
            raise SpecError("no spec is given: one for all rows ('off' for plain), or one for each")
        for spec in specs:
            if isinstance(spec, list | tuple) and (not spec or any(each in (None, *OFF_TEXTS) for each in spec)):
                raise SpecError(
                    f"{brief(spec)}: a list is one spec, of directions that act together; for a spec for each row give "
                    "`steering(*specs)`, and 'off' for plain"
                )
            self._registry.resolve(parse(spec))
        steered = Steered(self, specs)
        self._steering.owed.append(steered)
        return steered

    @contextmanager
    def read(self, *names: str, layers: Sequence[int] | str = "all", angle: bool = False) -> Iterator[Readings]:
        """`with steering.read("refusal") as reading:` reads the components along the named directions in every pass of
        the model in the block, at every position, as `before`, `after` (`[rows, positions, layers, k]`) and `norms`
        (`[rows, positions, layers]`); see `Readings`. Reading changes nothing. Combine it with a spec to see its
        effect: `with steering("refusal"), steering.read("refusal") as reading:`.

        Args:
            names: at most 4 directions, with at most `rank` rows together, which act at "resid_post".
            layers: "all", "source" (the layer that each direction came from) or numbers.
            angle: read `angles` too; each direction must have a plane, and counts as two rows.

        Raises:
            SpecError: for anything else.
            RuntimeError: when detached.
        """
        self._check_attached()
        at = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers
        try:
            wanted = readout.parse({"directions": list(names), "layers": at, "angle": angle})
            if wanted is None:
                raise SpecError("read: no direction is named")
            with self._registry.steady():
                read = self._registry.resolve_readout(wanted, Spec(), self._steering.anatomy.layers)
                admission = Admission(self._registry, Spec(), read)
        except SpecError as error:  # its messages name the field of a request, which is an argument here
            raise type(error)([problem.replace(readout.FIELD, "read") for problem in error.problems]) from None
        try:
            recorder = Recorder(self._steering.bank.rows_of(read.digests, read.angle), read)
            reading = Readings(read.lines, read.layers)
            block = f"steering.read({', '.join(map(repr, names))})"
            self._steering.watchers.append(recorder)
            try:
                with self._block(block, "read") as calls:
                    yield reading
            finally:
                self._steering.watchers.remove(recorder)
                reading.passes += recorder.collect()
            self._check_ended(block, calls, "reading")
        finally:
            admission.release()

    def detach(self) -> None:
        """Remove the hooks. Raises RuntimeError inside a block of this object, which would continue plain."""
        if self._steering.blocks:
            raise RuntimeError(f"{self._held}, and would continue plain: let it end first")
        self._steering.detach()

    def _attach(self) -> None:
        if not self.attached:
            torch.compiler.reset()  # Dynamo does not notice new hooks, so compiled code would run without them
            self._steering.attach()

    def __reduce__(self) -> str:
        raise TypeError("a steering is of its model, and can be neither copied nor pickled: attach to the other one")

    def __enter__(self) -> Attached:
        self._attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._steering.blocks:  # a block in a generator that was never resumed, for example
            error.add_note(f"{self._held}, so that this steering stays attached")
        else:
            self.detach()

    @property
    def _held(self) -> str:
        return f"the block `with {self._steering.blocks[-1]}:` of this steering is open"

    def __repr__(self) -> str:
        versions = self._registry.names().items()
        names = ", ".join(f"{name} {version.digest[:12]}" for name, version in versions) or "no directions"
        state = "attached" if self.attached else "detached"
        return f"<steering of {self._steering.anatomy.architecture}, {state}, at {', '.join(self.sites)}: {names}>"

    def _load(self, directions: Mapping[str, bytes]) -> None:
        problems: list[str] = []
        for name, data in directions.items():
            with noted(problems, DirectionError):
                self._registry.put(name, data)
        DirectionError.raise_for(problems)

    def _check_attached(self) -> None:
        if not self.attached:
            raise RuntimeError("this steering is detached, and would leave the model plain: call steer.attach again")
        self._steering.check_intact()

    @contextmanager
    def _block(self, block: object, becoming: str) -> Iterator[frozenset[Call]]:
        """Keep `block` open, which is in force already. Gives the calls of `generate` around it, all of this thread."""
        calls = self._steering.generating
        if any(call.thread != threading.get_ident() for call in calls):
            raise RuntimeError(
                f"a `generate` of another thread is under way, and would be {becoming} from here on: let it end first"
            )
        self._steering.blocks.append(block)
        try:
            yield calls
        finally:
            self._steering.blocks.remove(block)

    def _check_ended(self, block: object, calls: frozenset[Call], acting: str) -> None:
        """Check at the end of `block` that the same `calls` of `generate` are around it as at its beginning."""
        self._steering.check_intact()
        now = self._steering.generating
        if calls - now:
            raise RuntimeError(f"{block}: it began inside a `generate` that has ended before it: end it there too")
        if now - calls:
            raise RuntimeError(
                f"{block}: a `generate` of another thread is under way at the end of the block, and would continue "
                f"without its {acting}: let it end inside (`thread.join()`)"
            )


class Steered:
    """The return value of `steering(spec, ...)`: in force inside `with`. It can be entered several times."""

    def __init__(self, attached: Attached, specs: tuple[SpecLike, ...]) -> None:
        self._attached, self._specs = attached, specs
        self._entered: list[tuple[ExitStack, int, frozenset[Call]]] = []

    def __enter__(self) -> None:
        mine = self._attached
        owed = mine._steering.owed
        owed[:] = [other for other in owed if other is not self]
        mine._check_attached()
        with ExitStack() as stack:
            admissions: list[Admission] = []
            for spec in self._specs:
                admissions.append(Admission.of(mine._registry, parse(spec)))
                stack.callback(admissions[-1].release)
            stack.enter_context(mine._steering.batch([admission.spec for admission in admissions]))
            calls = stack.enter_context(mine._block(self, "steered"))
            self._entered.append((stack.pop_all(), mine._steering.passes, calls))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, passes, calls = self._entered.pop()
        stack.__exit__(kind, error, trace)
        if kind is None:
            self._attached._check_ended(self, calls, "steering")
        if kind is None and passes == self._attached._steering.passes:
            warnings.warn(f"{self!r}: no pass of the attached model ran in the block", RuntimeWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f"steering({', '.join(map(repr, self._specs))})"


class Readings:
    """What `with steering.read(...)` has read, complete when the block ends.

    `lines` names the k rows of directions in the arrays' last dimension, `layers` their layers, and `passes` has a
    `Reading` of each forward pass, `[rows, positions, …]`. `before`, `after` and `norms` are those of all passes one
    after the other along the positions, as the passes had them: after `generate` that is the prompt, with its padding,
    and each new token but the last, which no pass has seen. Where a token has not one pass of its own the positions are
    others: drafts of an assistant or of `prompt_lookup_num_tokens` are read also where they are not taken,
    `guidance_scale` has a second pass for each token, and `generate_batch` packs its requests into one row.
    """

    def __init__(self, lines: Sequence[Line], layers: Sequence[int]) -> None:
        self.lines, self.layers = tuple(lines), tuple(layers)
        self.passes: list[Reading] = []

    @property
    def before(self) -> NDArray[np.float32]:
        """⟨x, v⟩ before the operation, `[rows, positions, layers, k]`."""
        return self._joined(lambda one: one.before)

    @property
    def after(self) -> NDArray[np.float32]:
        """⟨x', v⟩ after the operation, `[rows, positions, layers, k]`; equal to `before` if nothing steers."""
        return self._joined(lambda one: one.after)

    @property
    def norms(self) -> NDArray[np.float32]:
        """‖x‖ before the operation, `[rows, positions, layers]`."""
        return self._joined(lambda one: one.norms)

    def __repr__(self) -> str:
        names = ", ".join(f"{line.name}[{line.row}]" for line in self.lines)
        shapes = [one.before.shape for one in self.passes]
        return f"<Readings of {names} at {len(self.layers)} layers: {len(shapes)} passes{shapes and f', {shapes[0]}'}>"

    @property
    def angles(self) -> NDArray[np.float32]:
        """The angles before and after the operation, in the plane of each direction, in degrees from its axis:
        `[2, rows, positions, layers, k]`; NaN at a layer that the direction does not steer. Raises ValueError if angles
        were not asked for."""
        return self._joined(lambda one: one.angles, positions=2)

    def _joined(self, side: Callable[[Reading], NDArray[np.float32] | None], positions: int = 1) -> NDArray[np.float32]:
        if not self.passes:
            raise ValueError(
                "nothing was read yet: readings come at the end of the block, of the passes of the attached model in it"
            )
        if len(rows := {len(one.norms) for one in self.passes}) > 1:
            raise ValueError(f"the passes have {sorted(rows)} rows: take them one by one, from `passes`")
        if not (found := [values for one in self.passes if (values := side(one)) is not None]):
            raise ValueError("angles were not read: ask for them with `read(..., angle=True)`")
        return np.concatenate(found, axis=positions)


_LOAD = "load it first, with transformers.AutoModelForCausalLM.from_pretrained"


def _check_arguments(directions: object, sites: object, rows: object, rank: object) -> None:
    problems = []
    if directions is not None and not isinstance(directions, Mapping):
        problems.append(
            f"directions: {type(directions).__name__} is not accepted: a mapping from names to paths or Directions, "
            'such as {"refusal": "directions/refusal.safetensors"}'
        )
    if isinstance(sites, str) or not isinstance(sites, Sequence) or not sites or any(s not in SITES for s in sites):
        problems.append(
            f"sites: {brief(sites, python=True)} is not accepted: a tuple of some of {', '.join(map(repr, SITES))}"
        )
    for name, number, most in (("rows", rows, MAX_ROWS), ("rank", rank, MAX_RANK)):
        if type(number) is not int or not 1 <= number <= most:
            problems.append(f"{name}: {brief(number, python=True)} is not accepted: a whole number from 1 to {most}")
    InvalidInput.raise_for(problems)


def _read(directions: Mapping[str, DirectionLike]) -> dict[str, bytes]:
    """The unchanged bytes of each file, so that digests are those of the files. Raises DirectionError with the problems
    of all files."""
    loaded, problems = dict[str, bytes](), list[str]()
    for name, source in directions.items():
        with noted(problems, DirectionError):
            check_name(name)
            if not isinstance(source, str | os.PathLike | Direction):
                raise DirectionError(f"{name}: {type(source).__name__} is not accepted: a Direction or a path")
            loaded[name] = source.to_bytes() if isinstance(source, Direction) else read_file(source)
            Direction.from_bytes(loaded[name], source=name if isinstance(source, Direction) else os.fspath(source))
    DirectionError.raise_for(problems)
    return loaded


def _inner(model: object) -> nn.Module:
    """The transformers model inside `model`. Raises UnsupportedModel, which says what to attach to."""
    import transformers

    if isinstance(model, str | os.PathLike):
        raise UnsupportedModel(f"{os.fspath(model)!r} is the name of a model: {_LOAD}")
    kind = type(model).__name__
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModel(f"{kind} copies the model for every pass: attach to its `.module`, and call that")
    if isinstance(model, transformers.PreTrainedModel):
        if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
            raise UnsupportedModel(
                f"{kind} is no causal language model with its head, such as AutoModelForCausalLM loads"
            )
        check_causal("this model", [kind])
        return cast("nn.Module", model)
    for around in ("get_base_model", "_orig_mod", "module", "model"):
        inner = getattr(model, around, None)
        inner = inner() if around == "get_base_model" and callable(inner) else inner
        if isinstance(inner, nn.Module):
            return _inner(inner)
    raise UnsupportedModel(f"{kind} is no model of transformers, nor around one: {_LOAD}, and attach to that")
