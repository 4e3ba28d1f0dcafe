"""Everything that knows the internals of transformers is in this file, checked at start.

Tested with transformers 5.19.0 and 5.24.0. What is relied on:

* continuous batching: what `_MANAGER` and `_PROCESSOR` name, and of an output `generated_tokens`, `error` and
  `is_finished`. `prepare_next_batch()` fills `inputs_and_outputs.requests_in_batch`, in whose order tokens are packed,
  each entry with `.state.request_id`, `.query_length` and `.has_new_token`: wrapped, to fill the index and the
  read-out on the stream of the pass. `model_runner._sample(scores, output_ids)` picks tokens from
  `[1, requests, vocabulary]`: replaced by our sampler, since its own has no per-request seed, min-p or top
  log-probabilities;
* loading: `get_model_conversion_mapping`, `rename_source_key` and `convert_and_load_state_dict_in_model` say which
  parameter a tensor of a file becomes, and make it of it, also where the files hold experts one by one;
* the hooks that record `output_hidden_states` are of the module `_RECORDERS`. A model that was asked for these once has
  such hooks for good;
* a pass of continuous batching is called with its `cache`, whose `use_prefix_sharing` tells of shared blocks; a manager
  that is kept for later calls is the model's `_cached_continuous_batching_manager`;
* `generate(custom_generate=...)` hands over the cache and the inputs as it prepared them, whatever the model calls
  them; `prepare_inputs_for_generation` and `_update_model_kwargs_for_generation` go on from there.

Prefix sharing hashes prompt tokens only, so it would hand a plain request the blocks of a steered one: it is off. CUDA
graphs and asynchronous steps are off too, since index and sampler change between steps on the host.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, core_model_loading
from transformers.cache_utils import Cache, DynamicLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.continuous_batching.utils import stream_context
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as hf_logging

from steer.errors import SteerError, UnsupportedModel, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

#: Kinds of rotary embedding whose frequencies depend on the longest request of a pass, once that is beyond the context
#: the model was first trained with.
LENGTH_DEPENDENT = ("longrope", "dynamic")
#: What transformers raises for a model that it cannot batch: attention it does not support, layers without a paged
#: cache, a configuration without what the cache is made from, or with another of it at each layer (Gemma 4), a cache
#: that finds no memory statistics.
_REFUSALS = (ValueError, KeyError, AttributeError, NotImplementedError, AmbiguousGlobalPerLayerAttributeError)

_MANAGER = (
    "add_request",
    "background_thread_status.fatal_error",
    "cancel_request",
    "destroy",
    "is_running",
    "output_router._lock",
    "output_router.output_queue",
    "output_router.result_handlers",
    "pause",
    "register_result_handler",
    "start",
    "stop",
)
_PROCESSOR = (
    "cache.max_tokens_read",
    "inputs_and_outputs.compute_stream",
    "inputs_and_outputs.input_ids",
    "inputs_and_outputs.position_ids",
    "inputs_and_outputs.requests_in_batch",
    "max_batch_tokens",
    "scheduler.block_new_requests",
    "_generation_step",
    "model_runner._sample",
    "prepare_next_batch",
)
_OUTPUT = ("error", "generated_tokens", "is_finished")
_RECORDERS = "transformers.utils.output_capturing"
#: Called by `generate` with the keywords `expand_size` and `input_ids` `[prompts, positions]`, of no positions where
#: there are embeddings.
_EXPAND = "_expand_inputs_for_generation"
_GENERATE = "generate"
_MODEL = ("generate", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


class _Discard(queue.Queue[object]):
    """The queue for results that no handler waits for. Every request here has one until it is cancelled, so what comes
    later is for nobody; transformers would keep it for as long as the process lives."""

    def _put(self, item: object) -> None:
        pass


class CannotBatch(SteerError):
    """transformers cannot serve this model in a continuous batch. The message says why."""


def start_manager(
    model: PreTrainedModel, *, context: int, page: int | None, cache_tokens: int | None, batch_tokens: int | None
) -> ContinuousBatchingManager:
    """A warmed-up `ContinuousBatchingManager` with its processor; what is None is transformers' choice. Raises
    CannotBatch, and then has changed nothing."""
    if not hasattr(model, "init_continuous_batching"):
        raise CannotBatch(f"{type(model).__name__} has no continuous batching in transformers")
    config = ContinuousBatchingConfig(
        allow_block_sharing=False, use_cuda_graph=False, use_async_batching=False, max_queue_size=0
    )
    config.page_size = page or config.page_size
    config.num_blocks = -(-cache_tokens // config.page_size) if cache_tokens else None
    config.max_batch_tokens = batch_tokens
    greedy = GenerationConfig(do_sample=False, max_new_tokens=context, eos_token_id=-1, pad_token_id=0)
    before = Attention(model)
    try:
        manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=config)
        manager.warmup()
        manager.output_router.output_queue = _Discard()
    except BaseException as error:
        before.put_back()
        if isinstance(error, _REFUSALS):
            raise CannotBatch(f"transformers refuses it: {short(error)}") from error
        raise
    return manager


def check_seams(manager: ContinuousBatchingManager) -> None:
    """Raises UnsupportedModel naming everything of the manager that is used here and that this version has not."""
    processor = getattr(manager, "batch_processor", None)
    missing = [f"ContinuousBatchingManager.{name}" for name in _MANAGER if not _has(manager, name)]
    missing += [f"ContinuousBatchProcessor.{name}" for name in _PROCESSOR if not _has(processor, name)]
    output = GenerationOutput("probe")
    missing += [f"GenerationOutput.{name}" for name in _OUTPUT if not _has(output, name)]
    if missing:
        raise UnsupportedModel(f"this version of transformers lacks {', '.join(missing)}, which Steer relies on")


def check_model(model: PreTrainedModel) -> None:
    """Raises UnsupportedModel where the model cannot be decoded as `generate` does."""
    missing = [name for name in _MODEL if not _has(model, name)]
    if missing:
        raise UnsupportedModel(f"{type(model).__name__} lacks {', '.join(missing)}, which Steer decodes with")


def short(error: BaseException) -> str:
    """Its kind and the beginning of its message, which may hold a whole configuration."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def _has(thing: object, path: str) -> bool:
    try:
        attrgetter(path)(thing)
    except AttributeError:
        return False
    return True


def pass_stream(processor: ContinuousBatchProcessor) -> AbstractContextManager[object]:
    """What is enqueued inside goes to the stream that the batch's pass runs on, so it is ordered before the pass."""
    return stream_context(processor.inputs_and_outputs.compute_stream)


def let_in(processor: ContinuousBatchProcessor) -> None:
    """Have waiting requests taken again after the cache was full. transformers does so when a request has finished,
    which one that was cancelled never does."""
    processor.scheduler.block_new_requests = False


class Attention:
    """The attention implementations that a model's configuration and those of its parts name, to be put back: a plain
    pass fails, or is wrong, under those of a paged cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        found = [config, config.get_text_config(), *(getattr(config, part, None) for part in config.sub_configs)]
        found += [getattr(module, "config", None) for module in model.modules()]
        self._configs = {id(c): c for c in found if hasattr(c, "_attn_implementation_internal")}.values()
        self._kept = self._now()

    def _now(self) -> list[object]:
        return [config._attn_implementation_internal for config in self._configs]

    def _put(self, implementations: list[object]) -> None:
        for config, implementation in zip(self._configs, implementations, strict=True):
            config._attn_implementation_internal = implementation

    def put_back(self) -> None:
        self._put(self._kept)

    @contextmanager
    def back(self) -> Iterator[None]:
        """What was there at first, while it lasts."""
        now = self._now()
        self._put(self._kept)
        try:
            yield
        finally:
            self._put(now)


def whole_cache(model: Any, cache: Any = None) -> bool:
    """Return whether the model's cache (by its configuration where none is given) is the keys and values of all tokens
    at every layer, and nothing else: no window, no running state."""
    try:
        cache = DynamicCache(config=model.config) if cache is None else cache
    except (AttributeError, KeyError, TypeError, ValueError):  # a kind of layer that it does not know
        return False
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def move_back(cache: DynamicCache, by: Sequence[int]) -> None:
    """Move the keys and values of each row `by[row]` positions back in a whole cache, in which as many of them are lost
    at the end. What then stands in front is nothing, and must be masked."""
    for layer in cache.layers:
        count = layer.keys.shape[-2]
        at = torch.arange(count, device=layer.keys.device) - torch.tensor(by, device=layer.keys.device)[:, None]
        at = (at % count)[:, None, :, None]
        layer.keys = torch.take_along_dim(layer.keys, at, dim=2)
        layer.values = torch.take_along_dim(layer.values, at, dim=2)


def shared_cache(cache: object) -> object | None:
    """`cache`, where it is paged and requests find in it what others have computed of the same first tokens."""
    return cache if getattr(cache, "use_prefix_sharing", False) else None


def past_of(given: Mapping[str, object]) -> Cache | None:
    """The cache that a pass goes on from, among what its decoder is called with."""
    found = (given.get(name) for name in ("past_key_values", "cache_params"))
    return next((cache for cache in found if isinstance(cache, Cache)), None)


def forget_manager(model: PreTrainedModel) -> None:
    """Have the next `generate_batch` begin with an empty cache, also where `persistent_manager=True` has left one. A
    manager that runs is not touched."""
    manager = vars(model).get("_cached_continuous_batching_manager")
    if manager is not None and not manager.is_running():
        model.destroy_cached_continuous_batching_manager()


def logits_in_pieces(model: Any, ids: Tensor, size: int) -> Generator[Tensor]:
    """The logits `[tokens, vocabulary]` at all of `ids` (`[1, tokens]`) but the last, for `size` tokens at a time: once
    through the decoder, and through the head for each piece, where the model can be asked for some of its logits."""
    decoder, whole = model.get_decoder(), ids.shape[1] - 1
    inside = model.get_output_embeddings() in decoder.modules()
    if inside or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        yield from model(input_ids=ids, use_cache=False).logits[0, :-1].split(size)
        return
    was, forward = vars(decoder).get("forward"), decoder.forward
    passed: list[object] = []

    def once(*args: object, **given: object) -> object:
        if not passed:
            passed.append(forward(*args, **given))
        return passed[0]

    decoder.forward = once
    try:
        for start in range(0, whole, size):
            kept = torch.arange(start, min(start + size, whole), device=ids.device)
            yield model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0]
    finally:
        if was is None:
            del decoder.forward
        else:
            decoder.forward = was


def _rotary_embeddings(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """What a configuration says of its rotary embedding, and of that of each kind of layer where there are several."""
    given = (getattr(config, name, None) for name in ("rope_parameters", "rope_scaling"))
    whole = [each for each in given if isinstance(each, dict)]
    return [one for each in whole for one in (each, *each.values()) if isinstance(one, dict)]


def length_dependent(config: PreTrainedConfig) -> tuple[str, int] | None:
    """The kind of rotary embedding whose frequencies depend on the longest request of a pass, and up to which length
    they do not; the least of several."""
    found = []
    for source in (config, config.get_text_config()):
        for rotary in _rotary_embeddings(source):
            kind = rotary.get("rope_type") or rotary.get("type")
            if isinstance(kind, str) and any(word in kind for word in LENGTH_DEPENDENT):
                limit = rotary.get("original_max_position_embeddings")
                limit = limit or getattr(source, "original_max_position_embeddings", None)
                found.append((kind, int(limit or getattr(source, "max_position_embeddings", 0) or 0)))
    return min(found, key=lambda pair: pair[1], default=None)


def longest_beside(config: PreTrainedConfig) -> float:
    """Tokens that a text may have beside others in a pass; with more its figures, or theirs, would be others."""
    found = length_dependent(config)
    return found[1] if found else math.inf


def everywhere(config: PreTrainedConfig, name: str) -> int | None:
    """A number of the configuration that holds of all layers; None where it has none, or one of its own for each."""
    try:
        found: int | None = getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return None
    return found


def lengths(config: PreTrainedConfig) -> list[int]:
    """Lengths beyond which the model treats a request in another way: original context, windows, chunks."""
    text = config.get_text_config()
    names = ("original_max_position_embeddings", "sliding_window", "attention_chunk_size", "max_position_embeddings")
    given = [getattr(text, name, None) for name in names]
    given += [rotary.get(names[0]) for rotary in _rotary_embeddings(text)]
    return sorted({int(length) for length in given if isinstance(length, int | float) and length > 0})


#: What goes around a call of a model's method with these keywords.
Around: TypeAlias = Callable[[Mapping[str, Any]], AbstractContextManager[None]]


def record_last(module: nn.Module) -> None:
    """Have what transformers records of the module's output stand behind all other hooks, which may change it."""
    hooks = module._forward_hooks
    for number in [number for number, hook in hooks.items() if getattr(hook, "__module__", None) == _RECORDERS]:
        hooks[number] = hooks.pop(number)


@dataclass(eq=False, frozen=True, slots=True)
class Call:
    """One of a model's `generate`, and the thread that made it."""

    thread: int


class Generations:
    """Until `remove`, knows which calls of the model's `generate` are under way, in all threads, and calls
    `check(prompts, each)` before one makes several rows of each prompt."""

    def __init__(self, model: PreTrainedModel, check: Callable[[int, int], None]) -> None:
        self.check = check
        self._model = model
        self._running: set[Call] = set()
        self._watched: list[tuple[_Watched, Around]] = []
        watching = ((_EXPAND, self._expanding), (_GENERATE, self._generating))
        for name, around in watching if hasattr(model, _EXPAND) else ():  # or it does not generate
            if not isinstance(method := getattr(model, name), _Watched):
                method = _Watched(model, name, method)
            method.watchers.append(around)
            self._watched.append((method, around))

    @property
    def running(self) -> frozenset[Call]:
        return frozenset(self._running)

    @contextmanager
    def _expanding(self, given: Mapping[str, Any]) -> Iterator[None]:
        if (each := given.get("expand_size", 1)) > 1:
            self.check(len(given["input_ids"]), each)
        yield

    @contextmanager
    def _generating(self, _given: Mapping[str, Any]) -> Iterator[None]:
        call = Call(threading.get_ident())
        self._running.add(call)
        try:
            yield
        finally:
            self._running.discard(call)

    def remove(self) -> None:
        for method, around in self._watched:
            method.leave(around)
        self._watched = []


class _Watched:
    """In the place of a model's method `name`, with what `watchers` put around each call. A copy of the model has its
    own method there, which nobody watches."""

    def __init__(self, model: PreTrainedModel, name: str, method: Callable[..., object]) -> None:
        functools.update_wrapper(self, method)
        self.watchers: list[Around] = []
        self._method, self._place, self._name = method, vars(model), name
        # what a copy of the model has in the place of what was watched is the method of its class
        of_class = getattr(method, "__func__", None) is getattr(type(model), name, None)
        self._own = {name: method} if name in self._place and not of_class else {}
        self._place[name] = self

    def leave(self, around: Around) -> None:
        """Without the last of its watchers the model has the method as it was. Where another was put around this since,
        it stays inside of that, and does nothing."""
        self.watchers.remove(around)
        if not self.watchers and self._place.get(self._name) is self:
            del self._place[self._name]
            self._place.update(self._own)

    def __call__(self, *args: object, **given: object) -> object:
        with ExitStack() as stack:
            for around in tuple(self.watchers):
                stack.enter_context(around(given))
            return self._method(*args, **given)

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., object]:
        return copy.deepcopy(self._method, memo)


class Decoding:
    """One request decoded as `generate` does it, a token at a time, by the cache and the inputs that it would make."""

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> None:
        def take(_model: PreTrainedModel, input_ids: Tensor, **prepared: object) -> tuple[Tensor, dict[str, object]]:
            """In place of the loop of `generate`."""
            for name in ("logits_processor", "stopping_criteria", "generation_config"):
                prepared.pop(name, None)
            return input_ids, prepared

        self._model, self._first = model, True
        self._ids, self._kept = model.generate(
            **_whole(model, prompt), generation_config=_greedy(max_tokens), custom_generate=take
        )

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return int(self._ids.shape[1])

    def inputs(self) -> dict[str, Tensor]:
        """Of the next forward pass: what the model has not seen, or all of it again where its cache ends."""
        new = None if self._first else 1
        made = self._model.prepare_inputs_for_generation(
            self._ids, next_sequence_length=new, is_first_iteration=self._first, **self._kept
        )
        self._first = False
        return made

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Of the next token, `[1, vocabulary]` float32: the forward pass."""
        out = self._model(**inputs, return_dict=True)
        self._kept = self._model._update_model_kwargs_for_generation(out, self._kept)
        return out.logits[:, -1].float()

    def append(self, token: int) -> None:
        self._ids = torch.cat([self._ids, self._ids.new_tensor([[token]])], dim=-1)


class _Forced(LogitsProcessor):
    """Makes `generate` choose given tokens, whatever its configuration forbids."""

    def __init__(self, prompt: int, tokens: Sequence[int]) -> None:
        self._prompt, self._tokens = prompt, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self._tokens[input_ids.shape[1] - self._prompt]] = 0.0
        return chosen


def teacher_forced_logprobs(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Log-probabilities `[tokens, vocabulary]` float32 that `generate` has where it is made to choose `tokens`."""
    out = model.generate(
        **_whole(model, prompt),
        generation_config=_greedy(len(tokens), output_logits=True, return_dict_in_generate=True),
        logits_processor=LogitsProcessorList([_Forced(len(prompt), tokens)]),
    )
    return torch.log_softmax(torch.stack([logits[0].float() for logits in out.logits]), -1)


def _whole(model: PreTrainedModel, prompt: Sequence[int]) -> dict[str, Tensor]:
    """A prompt none of whose tokens is padding, whatever its id."""
    ids = torch.tensor([list(prompt)], device=model.device)
    masked = "attention_mask" in inspect.signature(model.forward).parameters
    return {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})


def _greedy(count: int, **more: object) -> GenerationConfig:
    """For `count` tokens, whichever they are."""
    return GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=count, eos_token_id=[], pad_token_id=0, use_cache=True, **more
    )


class WeightLoading:
    """How transformers makes the parameters of `model` (on the meta device) of the tensors in its files."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._mapping = model, get_model_conversion_mapping(model)
        self._renamings = [each for each in self._mapping if isinstance(each, core_model_loading.WeightRenaming)]
        self._converters = [each for each in self._mapping if isinstance(each, core_model_loading.WeightConverter)]
        self._known = model.state_dict()

    def parameter(self, name: str) -> tuple[str, list[object]] | None:
        """The parameter that the tensor `name` of a file becomes, or the first of several, and what is done to it; None
        where the model has none."""
        prefix = self._model.base_model_prefix
        found, pattern = core_model_loading.rename_source_key(
            name, self._renamings, self._converters, prefix, self._known
        )
        if found not in self._known and name in self._known:
            found, pattern = core_model_loading.rename_source_key(name, [], [], prefix, self._known)
        if found not in self._known:
            return None
        operations = [c.operations for c in self._converters if pattern in c.source_patterns] if pattern else []
        return found, list(operations[0]) if operations else []

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put what `tensors` of the files become into the model, in the dtype that it has there."""
        shown = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        try:
            core_model_loading.convert_and_load_state_dict_in_model(
                self._model, tensors, LoadStateDictConfig(weight_mapping=self._mapping, dtype=None)
            )
        finally:
            if shown:
                hf_logging.enable_progress_bar()


def axis_in_file(operations: Sequence[object], axis: int, parameter: Sequence[int], file: Sequence[int]) -> int | None:
    """Which dimension of a tensor of the shape `file`, counted from the end, is the dimension `axis` (likewise) of the
    parameter of the shape `parameter` that is made of it by `operations`; None where that is not known."""
    dimensions = len(parameter)
    for operation in reversed(operations):
        if isinstance(operation, core_model_loading.MergeModulelist) and operation.dim == 0:
            dimensions -= 1  # experts one by one
        elif isinstance(operation, core_model_loading.Transpose):
            if operation.check_dims and tuple(file) == tuple(parameter):
                continue
            one, other = (d - dimensions if d >= 0 else d for d in (operation.dim0, operation.dim1))
            axis = {one: other, other: one}.get(axis, axis)
        else:
            return None
    return axis if dimensions == len(file) else None
