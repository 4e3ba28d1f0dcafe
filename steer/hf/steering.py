"""Steering hooks on a loaded transformers model. There is one at each hook point; it reads the token index, and probe
passes check it."""

from __future__ import annotations

import asyncio
import inspect
import math
import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, assert_never
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.errors import InvalidInput, NotFinite, UnsupportedModel, first_line
from steer.hf import internals
from steer.hf.load import text_architecture
from steer.hf.recomputation import Passes, going_backward
from steer.names import Site
from steer.runtime import hook_points, selfcheck
from steer.runtime.bank import EMBEDDING, DirectionBank, HookPoint, LocalPlacement, Operands, decide, gather, operate
from steer.runtime.memory import lasting
from steer.runtime.readout import ReadIndex, Recorder
from steer.runtime.token_index import RequestSteer, TokenIndex, Tokens
from steer.shape import Shape
from steer.spec import Spec
from steer.tokenization import Thinking

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

#: The length of the probe prompt in tokens: more than one, and short enough for the context of any model.
PROBE_TOKENS = 8

#: The most rows of a batch whose vectors are kept at all hook points. For each row they take at most 1 / (6 · d_model)
#: of the size of the weights.
KEPT = 64


T = TypeVar("T")


class Anatomy:
    """The parts of a causal language model that steering touches: its decoder, blocks and shape."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.model = model
        self.layers = int(config.num_hidden_layers)
        self.d_model = int(config.hidden_size)
        self.architecture = text_architecture(config.model_type, type(model).__name__)
        self.decoder: nn.Module = model.get_decoder()
        self.blocks = hook_points.find_blocks(self.decoder, self.layers)
        self.vocabulary = int(config.vocab_size)

    @property
    def device(self) -> torch.device:
        """The device on which the blocks compute. Weights that accelerate keeps elsewhere are on `meta` between
        passes."""
        for module in self.model.modules():
            if (computes_on := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
                return torch.zeros(0, device=computes_on).device  # `computes_on` may be the number of a GPU
        return next(self.model.parameters()).device

    @cached_property
    def _streams(self) -> list[torch.dtype]:
        """The dtypes of the stream that enters block 0 and of the stream that leaves it, found by a probe pass, because
        packed weights have other dtypes."""
        seen, ways = list[torch.dtype](), (hook_points.on_input, hook_points.on_output)
        with hook_points.hooks([watch(self.blocks[0], lambda x: seen.append(x.dtype)) for watch in ways]):
            self.probe()
        return seen

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stream."""
        return self._streams[-1]

    @property
    def eps(self) -> float:
        """The coarsest rounding of the stream, and at least the rounding of float32, which the bank has. A stream that
        a model sums in float32 may begin in 16 bits."""
        return max(torch.finfo(dtype).eps for dtype in (torch.float32, *self._streams))

    @torch.no_grad()
    def probe(self, rows: int = 1, apart: Sequence[int] = ()) -> CausalLMOutputWithPast:
        """Make a short forward pass over fixed token ids.

        Args:
            rows: the number of rows, all with the same ids.
            apart: makes rows that differ, one for each of these numbers below PROBE_TOKENS. The ids of the row are
                larger by the number, and its length is smaller by it.

        Returns:
            The model's output.

        Raises:
            UnsupportedModel: the model does not run on token ids alone.
        """
        at = torch.arange(PROBE_TOKENS, device=self.device)
        by = torch.tensor(apart or [0] * rows, device=self.device)[:, None]
        given = {"input_ids": (at * 7 + 11 + by) % self.vocabulary}
        if apart and "attention_mask" in inspect.signature(self.model.forward).parameters:
            mask = (at < PROBE_TOKENS - by).long()
            with suppress(UnsupportedModel):  # such positions may need more than tokens
                return self._run(**given, attention_mask=mask)
        return self._run(**given)

    def _run(self, **given: Tensor) -> CausalLMOutputWithPast:
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code would run without new hooks
                return self.model(**given, use_cache=False)
        except InvalidInput:  # raised by a hook of ours
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise UnsupportedModel(
                f"{self.architecture} does not run on the ids of tokens alone: {first_line(error)}"
            ) from error

    def forget_lengths(self) -> None:
        """Make a short pass so that the model forgets the length of the texts that it has read: until a short pass, a
        dynamic rotary embedding keeps the frequencies of the longest text."""
        if internals.longest_beside(self.model.config) < math.inf:
            self.probe()


class Steering:
    """Hooks on every hook point of one model. They read one bank through one token index.

    Args:
        model: the model.
        sites: the sites at which the operation can act.
        rows: the number of usable rows of the bank.
        rank: the most rows that one request can use.

    Attributes:
        index: the entries that act on each token of the running forward pass, in the order in which the model sees the
            tokens.
        reads: the tokens that are read.
        watchers: the recorders that read all tokens.

    Raises:
        UnsupportedModel: the model cannot be steered.
    """

    def __init__(
        self, model: PreTrainedModel, *, sites: Iterable[Site] = ("resid_post",), rows: int = 32, rank: int = 4
    ) -> None:
        _check_places(model)
        self.anatomy = Anatomy(model)
        _check_free(self.anatomy.decoder)
        _check_repeats(self.anatomy)
        self.sites: tuple[Site, ...] = tuple(dict.fromkeys(sites))
        self._targets = self._find_targets()
        self.bank = DirectionBank(
            list(dict.fromkeys(hooked.point for hooked in self._targets)),
            rows=rows,
            rank=rank,
            d_model=self.anatomy.d_model,
            device=self.anatomy.device,
        )
        self.index = TokenIndex(rank, 1, self.anatomy.device)
        self.reads = ReadIndex(self.anatomy.device, self.bank.rows_of)
        #: The hooks, each with its module; and the path from the model to each of these modules, as (parent, name,
        #: child).
        self._handles: list[tuple[nn.Module, RemovableHandle]] = []
        self._ways: list[tuple[nn.Module, str, nn.Module]] = []
        #: The list that holds the blocks, and its content when it was last found to be right.
        self._list, self._held = nn.ModuleList(), list[nn.Module]()
        #: The open `with` blocks in which every pass must go through the hooks; and objects that were made for a `with`
        #: block that has not begun. A call without `with` would leave passes plain.
        self.blocks: list[object] = []
        self.owed: list[object] = []
        self._generations: internals.Generations | None = None
        self._batch = _Batch(())
        #: The steering of each row that the index describes; empty if the index describes packed tokens one by one.
        self._rows: Sequence[RequestSteer | None] = ()
        #: For each autograd graph of a pass: the rows under which the pass ran.
        self._graphs = Passes()
        #: The rows and positions of the running pass, from the arguments of its decoder.
        self._tokens: tuple[int, int] | None = None
        self._pass = _Pass()
        #: Whether a stale cache causes a warning, because the user may call the model with a cache of their own. Calls
        #: by Steer itself change the steering of a cache on purpose.
        self.warns_of_stale_caches = False
        #: For each cache the steering (`_Batch.asked`) under which it was filled last.
        self._filled = WeakKeyDictionary[object, tuple[object, ...]]()
        #: How many passes of the decoder began with the hooks on.
        self.passes = 0
        self.watchers: list[Recorder] = []
        #: The operands of the last steered passes and what they are of, by hook point; and the requests of the passes.
        self._kept: dict[HookPoint, tuple[tuple[int, int, int], list[Operands]]] = {}
        self._keeps: tuple[Sequence[RequestSteer | None], Sequence[int]] = [], []
        #: All batches that have not ended, of which the last is in force; and the thread and task that own them.
        self._batches: list[_Batch] = []
        self._owner: _Owner | None = None
        self._turn = threading.Lock()
        self._verify()

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def placement(self, thinking: Thinking | None = None) -> LocalPlacement:
        """The placement by which a registry makes directions resident for this model. thinking: the tokens that begin
        and end the model's thinking."""
        a, bank = self.anatomy, self.bank
        shape = Shape(a.architecture, a.layers, a.d_model, bank.sites, bank.rank, a.dtype, thinking)
        return LocalPlacement(shape, bank)

    def attach(self) -> None:
        """Put the hooks on, if they are not on yet. The caller must discard code that `torch.compile` made before,
        because it would run without the hooks."""
        if not self._handles:
            decoder = self.anatomy.decoder
            begin, end = (_Hung(self, self._hook(each)) for each in (self._begin, self._end))
            hung = [
                decoder.register_forward_pre_hook(begin, with_kwargs=True),
                decoder.register_forward_hook(end, always_call=True),
            ]
            self._handles = [(decoder, handle) for handle in hung]
            in_order = sorted(self._targets, key=lambda hooked: hooked.point.layer)
            for number, hooked in enumerate(in_order):
                hang = hook_points.on_input if hooked.before else hook_points.on_output
                handle = hang(hooked.module, self._hook(self._transform(hooked.point, 1 << number)))
                self._handles.append((hooked.module, handle))
                internals.record_last(hooked.module)
            self._list = hook_points.find_list(self.anatomy.decoder, self.anatomy.layers)
            self._held = list(self._list)
            self._ways = _ways(self.anatomy.model, [module for module, _ in self._handles])
            self._generations = internals.Generations(self.anatomy.model, self._check_prompts)

    @property
    def generating(self) -> frozenset[internals.Call]:
        """The calls of the model's `generate` that are running, in all threads."""
        return self._generations.running if self._generations else frozenset()

    @property
    def intact(self) -> bool:
        """Whether all hooks are still on modules of the model, and the model's blocks are those that have hooks, in the
        same order. False if a block was replaced, added or moved."""
        if any(h.id not in m._forward_hooks and h.id not in m._forward_pre_hooks for m, h in self._handles):
            return False
        ways, held = self._ways, self._held
        if all(parent._modules.get(name) is child for parent, name, child in ways) and held == list(
            self._list._modules.values()
        ):
            return True  # the fast way, because each pass checks this
        modules = [module for module, _ in self._handles]
        if not set(modules) <= set(self.anatomy.model.modules()):
            return False
        try:
            self._list = hook_points.find_list(self.anatomy.decoder, self.anatomy.layers)
        except UnsupportedModel:
            return False
        # a block may now be inside of another module in the list
        if not all(block in set(now.modules()) for block, now in zip(self.anatomy.blocks, self._list, strict=True)):
            return False
        # a module around a writer would add to the writer's output after its hook
        acting = [(self.anatomy.blocks[h.point.layer], h.module) for h in self._targets if not h.before]
        if not all(module is block or module in block.children() for block, module in acting):
            return False
        self._ways, self._held = _ways(self.anatomy.model, modules), list(self._list)
        return True

    def check_intact(self) -> None:
        if not self.intact:
            raise RuntimeError(
                "some blocks or hooks are no longer on the model as they were (a block was replaced, added or moved, a "
                "writer has an adapter around it, or hooks were removed), and passes would be plain there or steered "
                "as another layer is: detach, and call steer.attach again"
            )

    def detach(self) -> None:
        for _, handle in self._handles:
            handle.remove()
        self._handles, self._ways = [], []
        if self._generations:
            self._generations.remove()
            self._generations = None

    def resize(self, max_tokens: int) -> None:
        """Make the index large enough for batches of `max_tokens`."""
        if max_tokens > self.index.max_tokens:
            self.index = TokenIndex(self.bank.rank, max_tokens, self.anatomy.device, decisions=self.index.decisions)

    @contextmanager
    def batch(
        self,
        specs: Sequence[Spec | RequestSteer | None],
        lengths: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        tokens: Tokens | None = None,
    ) -> Iterator[None]:
        """Steer the forward passes inside. A batch may be inside another: after it the outer one is in force again.

        Args:
            specs: the steering of each group of rows, None for plain. The rows of every `[rows, positions]` pass are
                divided into as many equal groups as there are specs, and the first group is steered by the first spec.
            lengths: for packed passes: how many tokens of the pass are steered by each spec, in their order. The specs
                then apply to tokens in place of rows.
            starts: for packed passes: the position of the first of these tokens in its request.
            tokens: for packed passes: the tokens of the pass.

        Raises:
            InvalidInput: raised by a pass whose number of rows is not a multiple of the number of specs.
            NotFinite: raised at the end if a result would have left the range of the model's numbers and was therefore
                not used.
            RuntimeError: another thread or task has a batch on this model. A model has one index, so each batch would
                steer by the other's entries.
        """
        rows = [self.bank.steer(spec) if isinstance(spec, Spec) else spec for spec in specs]
        owner = _owner()
        with self._turn:
            if self._batches and self._owner != owner:
                raise RuntimeError(
                    "another thread or asyncio task steers this model at this moment: let its batch end first"
                )
            self._owner = owner
            self._batches.append(own := _Batch(rows, lengths, starts, tokens))
            if lengths is None and any(specs):
                own.asked = tuple(spec if isinstance(spec, Spec) else spec and id(spec) for spec in specs)
            self._lay(own)
        try:
            yield
        finally:
            with self._turn:  # this is not always the last batch that began: blocks of two generators end in any order
                self._batches = [other for other in self._batches if other is not own]
                self._lay(self._batches[-1] if self._batches else _Batch(()))
                self._owner = self._owner if self._batches else None
        if own.error is not None:
            raise own.error
        if own.lost is not None and own.lost.any():
            lost = ", ".join(map(str, own.lost.nonzero().flatten().tolist()))
            raise NotFinite(f"spec {lost} of {len(rows)}" if len(rows) > 1 and lengths is None else "")

    def padded_batch(
        self, steers: Sequence[RequestSteer | None], spans: Sequence[range], ids: Tensor, left: bool = False
    ) -> AbstractContextManager[None]:
        """A `batch` for one pass over padded rows.

        Args:
            steers: the steering of each row.
            spans: the positions of each row in its request.
            ids: the token ids of the pass, `[rows, positions]`. Rows that are shorter are padded.
            left: whether the padding is in front.
        """
        if not any(steer is not None and (steer.then or steer.probe or steer.phase) for steer in steers):
            return self.batch(steers)
        width = max(map(len, spans))
        parts = list[tuple[RequestSteer | None, int, int]]()
        for steer, span in zip(steers, spans, strict=True):
            own, padding = (steer, len(span), span.start), (None, width - len(span), 0)
            parts += (padding, own) if left else (own, padding)
        at = torch.cat([torch.arange(start, start + length) for _, length, start in parts])
        tokens = ids.flatten(), at.to(ids.device)
        return self.batch([s for s, *_ in parts], [n for _, n, _ in parts], [start for *_, start in parts], tokens)

    def fill(
        self,
        steers: Sequence[RequestSteer | None],
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        """Steer the `lengths[i]` tokens of request i in the next pass by `steers[i]`, in batch order; see
        `TokenIndex.fill`."""
        if any(steers):
            at = starts or [0] * len(steers)
            parts = [steer and steer.part(*each) for steer, *each in zip(steers, at, lengths, strict=True)]
            known = all(part or not steer for steer, part in zip(steers, parts, strict=True))
            last, counts = self._keeps
            if not known or counts != lengths or not all(map(operator.is_, last, parts)):
                self._kept.clear()
            self._keeps = (parts, list(lengths)) if known else ([], [])
        self.index.fill_with(steers, lengths, starts, tokens)

    def _hook(self, hook: Callable[..., T]) -> Callable[..., T]:
        """Return `hook` in a form that compiled code calls without tracing it.

        If it were traced, its graph would be compiled again for every change of the steering, and a replayed graph
        would not call it. An error on a thread other than the batch's is also stored as the batch's error, because the
        code that runs passes there, such as `generate_batch`, may continue without the answers that the error cost.
        """

        def kept(*given: Any) -> T:
            try:
                return hook(*given)
            except Exception as error:
                if self._batches and self._owner and self._owner[0] != threading.get_ident():
                    self._batches[-1].error = error
                raise

        apart = torch.compiler.disable(kept)
        return lambda *given: apart(*given) if torch.compiler.is_compiling() else kept(*given)

    def _begin(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Prepare for a pass of the decoder, before it begins. Its rows are known here, whatever shape the blocks will
        see."""
        if torch.is_grad_enabled():  # else there is no graph through which autograd could go back
            if going_backward():
                self._check_again()
                return
            self._graphs.begins()
        if self.blocks:
            if torch.compiler.is_exporting() or torch._C._is_tracing():
                raise RuntimeError(
                    f"`with {self.blocks[-1]}:` is open: torch.export would lose its steering, and torch.jit.trace "
                    "would keep it for good. Export or trace outside of the block, or what `steer bake` has written"
                )
            self.check_intact()
        self._check_cache(kwargs)
        self._tokens = tokens = _tokens_of(args, kwargs)
        self.passes += 1
        self._pass.reached = 0
        if tokens is not None and len(self._rows) > 1 and tokens[0] % len(self._rows):
            raise InvalidInput(
                f"{len(self._rows)} specs for a pass of {tokens[0]} rows: give one spec for all rows, or a number of "
                "specs that divides the rows (a spec for each row; beams and several answers follow their row)"
            )
        if self.owed:
            first, *_ = self.owed
            self.owed.clear()
            raise RuntimeError(f"{first!r} was called without `with` and steers nothing: write `with {first!r}: ...`")
        for watcher in self.watchers:
            watcher.begin(tokens)

    def _check_cache(self, given: dict[str, object]) -> None:
        """Check that the cache of a pass was filled under the steering of the pass, because its content is not computed
        again. Raise InvalidInput for a cache that requests share, and warn for the cache of a single request."""
        acting = self._batch.asked
        cache = internals.shared_cache(given.get("cache"))
        if cache is not None and self._filled.setdefault(cache, acting) != acting:
            raise InvalidInput(
                "this pass would take beginnings of prompts from a cache that was filled under another steering: use a "
                "manager for each steering, or one with `allow_block_sharing=False` in its ContinuousBatchingConfig"
            )
        if self.warns_of_stale_caches and (past := internals.past_of(given)) is not None:
            if self._filled.get(past, acting) != acting and past.get_seq_length():
                warnings.warn(
                    "a pass goes on from a cache that was filled under another steering: the tokens in it stay as they "
                    "were; begin with an empty cache for what is to be steered, or plain, as a whole",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._filled[past] = acting

    def _end(self, _args: object, output: object) -> None:
        """Check a pass of the decoder after its end. output: None if an error ended the pass."""
        if torch.is_grad_enabled():
            if going_backward():
                return
            self._graphs.ended(self._rows)
        reached = self._pass.reached
        # a pass may leave out the last layers (an assistant's early exit), and in training any layers (LayerDrop)
        right = reached and not reached & (reached + 1)
        if right or not self.blocks or output is None or self.anatomy.decoder.training:
            return
        layers = sorted(h.point.layer for h in self._targets)
        missed = sorted({layer for number, layer in enumerate(layers) if not reached >> number & 1})
        raise RuntimeError(
            f"`with {self.blocks[-1]}:` is open, and a pass of {type(self.anatomy.decoder).__name__} went around "
            f"{f'the hooks of layers {missed}' if reached else 'all hooks'}, which would be plain there: blocks must "
            "be called as modules are, not by their `forward`"
        )

    def _check_again(self) -> None:
        """Check, before a part of a pass is computed again, that its steering is that of the pass. Raises
        RuntimeError."""
        if not self._graphs.ran_under(self._rows):
            raise RuntimeError(
                "gradient checkpointing computes a pass again under another steering than it had, or one that is no "
                "longer known: call backward inside the `with` block of the pass"
            )

    def _check_prompts(self, prompts: int, each: int) -> None:
        """Check the number of specs before `generate` makes `each` rows of every prompt (beams that exchange their
        caches, or several answers). Raises InvalidInput."""
        if prompts % len(self._rows or (None,)):
            raise InvalidInput(
                f"{len(self._rows)} specs for {prompts} prompts of {each} beams or answers each: give one spec for all "
                "prompts, or a number of specs that divides the prompts (a spec for each prompt); for answers to one "
                "prompt under several specs, give the prompt as often"
            )

    def _check_shape(self, x: Tensor, point: HookPoint) -> None:
        """Raise UnsupportedModel unless the rows of the pass come first in x; x may also be `[tokens, d_model]`."""
        if self._tokens is None:
            if len(self._rows) == 1 and not self.watchers:
                return
            problem = "its decoder is not called with token ids or embeddings"
        elif x.shape[0] in ((rows := self._tokens[0]), *([rows * self._tokens[1]] if x.dim() == 2 else [])):
            return
        else:
            problem = f"for tokens {list(self._tokens)} the stream is {list(x.shape)}"
        raise UnsupportedModel(
            f"{self.anatomy.architecture}: {point.site} of layer {point.layer}: which rows of a batch the stream "
            f"belongs to is not known: {problem}; what is expected is [rows, positions, d_model]"
        )

    def _lay(self, batch: _Batch) -> None:
        """Note what the batch in force has lost, and put `batch` in force."""
        if self._batch.rows and self.index.active:
            self._batch.lose(self.index.lost[: self.index.used])
            self.index.keep()
        self._batch = batch
        internals.forget_manager(self.anatomy.model)
        lengths = [1] * len(batch.rows) if batch.lengths is None else batch.lengths
        self.resize(sum(lengths))
        self._rows = batch.rows if batch.lengths is None else ()
        self.fill(batch.rows, lengths, batch.starts, batch.tokens)
        self.reads.clear()

    def _transform(self, point: HookPoint, bit: int) -> hook_points.Transform:
        """The transform of the stream at `point`. bit: the bit of the hook point in `_Pass.reached`."""
        bank_slice, layer = self.bank.slices[point], point.layer
        readable = point.readable

        def transform(x: Tensor) -> Tensor | None:
            if again := torch.is_grad_enabled() and going_backward():
                self._check_again()
            self._pass.reached |= bit
            steered, read = self.index.active, readable and layer in self.reads.layers
            watchers = self.watchers if readable and not again else ()  # they have already recorded this pass
            if not (steered or read or watchers):
                return None
            if (self._rows or watchers) and not again:  # later passes may have changed `_tokens`
                self._check_shape(x, point)
            if readable and layer in self.index.deciding:
                flat = x.flatten(0, -2)
                decide(flat, bank_slice, self.index.first(len(flat)).rows.long(), self.index.conditional_of(len(flat)))
            moved = self._moved(x, point) if steered else x
            for watcher in watchers:
                watcher.record(layer, x, moved, bank_slice.vectors)
            if read:
                self.reads.record(layer, x.flatten(0, -2), moved.flatten(0, -2), bank_slice.vectors)
            return moved if steered else None

        return transform

    def _moved(self, x: Tensor, point: HookPoint) -> Tensor:
        """The stream `[..., d_model]` of all tokens after the operation."""
        count = len(self._rows) or x.shape[:-1].numel()
        operands = self._operands(point, count)
        if not operands:
            return x
        shape = x.shape if operands[0].strengths.dim() == 1 else (count, -1, x.shape[-1])
        asks = x.device.type == "cpu" and not _transformed(x)
        moved, lost = operate(x.reshape(shape), operands, asks=asks)
        if _transformed(lost):
            if bool(torch.func.debug_unwrap(lost).any()):  # inside a transform nothing outside of it can be written
                self._batch.error = NotFinite("")
        elif not asks or lost.any():
            self.index.lost[:count].logical_or_(lost.reshape(count, -1).any(-1))
        return moved.reshape(x.shape)

    def _operands(self, point: HookPoint, count: int) -> list[Operands]:
        """The operands at `point` for the first `count` entries of the index. Those of small batches are kept until the
        entries or the rows change."""
        bank_slice = self.bank.slices[point]
        of = bank_slice.vectors._version, bank_slice.coefficients._version, count
        kept = self._kept.get(point)
        if kept is not None and kept[0] == of:
            return kept[1]
        acting, *how = self.index.acting(count)
        with lasting():  # operands that are kept may be used by a pass in another autograd mode
            # the index is written in place, and a backward pass may come after it has changed
            acting = acting._replace(strengths=acting.strengths.clone())
            operands = gather(bank_slice, *acting, *how)
        if acting.rows.shape[1] <= KEPT and not any(_transformed(each.vectors) for each in operands):
            self._kept[point] = of, operands
        return operands

    def _find_targets(self) -> list[selfcheck.HookedModule]:
        """The hooked module of each hook point."""
        anatomy, blocks = self.anatomy, self.anatomy.blocks
        targets: list[selfcheck.HookedModule] = []
        for site in self.sites:
            match site:
                case "resid_post":
                    modules: list[tuple[nn.Module, ...]] = [(block,) for block in blocks]
                case "writers":
                    modules = hook_points.find_writers(blocks, anatomy.probe)
                case _:
                    assert_never(site)
            point = HookPoint(site, EMBEDDING)
            targets.append(
                selfcheck.HookedModule(point, blocks[0], lambda given: hook_points.stream_given(*given), before=True)
            )
            targets += [
                selfcheck.HookedModule(HookPoint(site, layer, term), module, hook_points.stream_of)
                for layer, acting in enumerate(modules)
                for term, module in enumerate(acting)
            ]
        return targets

    def _verify(self) -> None:
        """Check that the operation acts on the stream (`runtime.selfcheck`), in a batch of steered and plain rows, and
        that a plain pass is unchanged. Raises UnsupportedModel, which names the hook points that failed."""
        anatomy = self.anatomy
        plain, again = anatomy.probe().logits, anatomy.probe().logits

        def run(steers: selfcheck.Steers) -> None:
            with self.batch(steers):
                try:
                    anatomy.probe(len(steers))
                except InvalidInput as error:  # the decoder is called with other rows than the model
                    raise UnsupportedModel(
                        f"{anatomy.architecture}: which rows of a batch the stream belongs to is not known: its "
                        f"decoder is called with {list(self._tokens or ())} tokens for {len(steers)} rows of "
                        f"{PROBE_TOKENS}"
                    ) from error

        dead = selfcheck.rest_is_dead(anatomy.blocks, lambda: anatomy.probe().logits, plain, again)
        blocks = dict(enumerate(anatomy.blocks))
        tokens = PROBE_TOKENS * len(selfcheck.CASES)
        checked = selfcheck.EagerCheck(
            anatomy.model, blocks, self._targets, self.bank, run, tokens, anatomy.eps, dead=dead
        )
        self.attach()
        try:
            bad, _ = checked.problems()
            if not selfcheck.same(anatomy.probe().logits, plain, again):
                bad.append("a plain pass is not the same with hooks as without")
            if not bad and not self._rows_stay():
                bad.append("what steers one row of a batch changes another most: its rows change places inside")
        finally:
            self.detach()
        if bad:
            raise UnsupportedModel(f"{anatomy.architecture} cannot be steered: {'; '.join(bad)}")

    def _rows_stay(self) -> bool:
        """Whether the steering of a row acts on that row, even if a decoder sorts rows by their tokens or lengths."""
        order = (3, 0, 5, 1, 4, 2)  # sorting would move the first row to the middle
        plain = self.anatomy.probe(apart=order).logits
        with selfcheck.vector(self.bank) as steer, self.batch([steer] + [None] * (len(order) - 1)):
            steered = self.anatomy.probe(apart=order).logits
        change = (steered - plain).float().nan_to_num().abs().flatten(1).amax(-1)
        return bool(change[0] > 0) and int(change.argmax()) == 0


class _Pass(threading.local):
    """The pass that runs on a thread. `reached` has a bit for each hook point that it has reached, in the order of
    layers."""

    reached = 0


class _Hung(hook_points.Hung):
    """A hook on a decoder, by which the steering of a model can be found."""

    def __init__(self, steering: Steering, hook: Callable[..., None]) -> None:
        super().__init__(steering.anatomy.decoder, hook)
        self.steering = steering


def _check_free(decoder: nn.Module) -> None:
    """Raise RuntimeError inside a `with` block of another steering, because the model's passes are steered there."""
    others = (hook for hook in decoder._forward_pre_hooks.values() if isinstance(hook, _Hung))
    if blocks := [block for hook in others if hook.module is decoder for block in hook.steering.blocks]:
        raise RuntimeError(
            f"`with {blocks[-1]}:` of another steering is open on this model, which cannot be checked inside of it: "
            "attach before it, or let it end first"
        )


@dataclass(eq=False, slots=True)
class _Batch:
    """The steering of the passes of one batch.

    Attributes:
        rows: the steering of each group of rows or, with `lengths`, of each request of a packed pass.
        lengths: how many tokens each request has in a packed pass; None for passes of rows.
        starts: the position of the first of these tokens in its request.
        tokens: the tokens of the packed pass.
        lost: which rows or tokens are lost, `[…]` bool on the device; None until the first look.
        error: an error to raise at the end of the batch: from another thread, or for a row that was lost inside a
            transform of torch.func.
    """

    rows: Sequence[RequestSteer | None]
    lengths: Sequence[int] | None = None
    starts: Sequence[int] | None = None
    tokens: Tokens | None = None
    lost: Tensor | None = None
    error: Exception | None = None
    #: Equal for batches that steer alike; empty for plain and for packed batches.
    asked: tuple[object, ...] = ()

    def lose(self, flags: Tensor) -> None:
        self.lost = flags.clone() if self.lost is None else self.lost | flags


#: A thread, and the asyncio task that runs on it, if one does.
_Owner: TypeAlias = "tuple[int, asyncio.Task[object] | None]"


def _owner() -> _Owner:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs on this thread
        task = None
    return threading.get_ident(), task


def _check_places(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel for a model on several devices, because there is one bank, and for a model whose weights
    are not loaded."""
    offloaded = getattr(model, "hf_device_map", None) or hasattr(model, "_hf_hook")
    if not offloaded and all(each.is_meta for each in model.parameters()):
        raise UnsupportedModel(f"{type(model).__name__} is on the device meta, without its weights: load them first")
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()} - {"cpu", "disk"}
    if len(places) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} is spread over the devices {', '.join(sorted(places))}: only models on one device "
            'are steered; load it with device_map={"": 0} (--device cuda:0), or serve it with vLLM'
        )


def _check_repeats(anatomy: Anatomy) -> None:
    """Raise UnsupportedModel for a model whose equal passes differ (dropout). It would fail the self-check, whose
    message would not say why."""
    training = any(m.training for m in anatomy.model.modules() if not list(m.children()))
    if training and not torch.equal(anatomy.probe().logits, anatomy.probe().logits):
        raise UnsupportedModel(
            f"{type(anatomy.model).__name__} is in training mode and two equal passes differ (dropout), so that "
            "nothing can be checked: call model.eval() first"
        )


def _ways(model: nn.Module, to: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """The path from the model to each of the modules `to`, as (parent, name, child), without repetitions."""
    names, found = {module: name for name, module in model.named_modules()}, {}
    for module in to:
        parent = model
        for name in filter(None, names[module].split(".")):
            child = parent.get_submodule(name)
            found[parent, name] = child
            parent = child
    return [(parent, name, child) for (parent, name), child in found.items()]


def _tokens_of(args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[int, int] | None:
    """The rows and positions of a decoder's arguments: of token ids, or of embeddings in place of them. None if there
    are neither."""
    for given in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(given, Tensor) and given.dim() >= 2:
            return int(given.shape[0]), int(given.shape[1])
    return None


def _transformed(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a transform of torch.func (`grad`, `vjp`, `jvp`, `vmap`), outside of which it has
    no value."""
    return torch.func.debug_unwrap(tensor) is not tensor
