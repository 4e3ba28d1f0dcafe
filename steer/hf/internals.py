"""The only file that knows the internals of transformers. They are checked at start.

Tested with transformers 5.19.0 and 5.24.0. Steer relies on these parts:

* Continuous batching: the names in `_MANAGER` and `_PROCESSOR`, and `generated_tokens`, `error` and `is_finished` of an
  output. `prepare_next_batch()` fills `inputs_and_outputs.requests_in_batch`, in whose order tokens are packed. Each
  entry has `.state.request_id`, `.query_length` and `.has_new_token`. Steer wraps this method to fill the index and the
  read-out on the stream of the pass. `model_runner._sample(scores, output_ids)` picks tokens from
  `[1, requests, vocabulary]`. Steer replaces it by its own sampler, because the one of transformers has no per-request
  seed, min-p or top log-probabilities.
* Loading: `get_model_conversion_mapping`, `rename_source_key` and `convert_and_load_state_dict_in_model` tell which
  parameter a tensor of a file becomes, and make the parameter, also if the files hold experts one by one.
* The hooks that record `output_hidden_states` are defined in the module `_RECORDERS`. A model that was once asked for
  hidden states keeps these hooks for good.
* A pass of continuous batching is called with its `cache`, whose `use_prefix_sharing` tells whether blocks are shared.
  A manager that is kept for later calls is the model's `_cached_continuous_batching_manager`.
* `generate(custom_generate=...)` hands over the cache and the inputs that it has prepared, whatever their names in the
  model. `prepare_inputs_for_generation` and `_update_model_kwargs_for_generation` continue from there.

Prefix sharing hashes prompt tokens only, so it would give a plain request the blocks of a steered one. It is therefore
off. CUDA graphs and asynchronous steps are off too, because the index and the sampler change between steps on the host.
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

#: Kinds of rotary embedding whose frequencies depend on the longest request of a pass, once that request is longer than
#: the context with which the model was first trained.
LENGTH_DEPENDENT = ("longrope", "dynamic")
#: The errors that transformers raises for a model that it cannot batch: because it does not support the attention, a
#: layer has no paged cache, the configuration lacks a number from which the cache is made or has a different one for
#: each layer (Gemma 4), or the cache finds no memory statistics.
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
#: The method that `generate` calls with the keywords `expand_size` and `input_ids` `[prompts, positions]`. If
#: embeddings are given, `input_ids` has no positions.
_EXPAND = "_expand_inputs_for_generation"
_GENERATE = "generate"
_MODEL = ("generate", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


class _Discard(queue.Queue[object]):
    """A queue that drops its items, for results without a handler. Every request of Steer has a handler until it is
    cancelled, so nobody waits for a result that comes later; transformers would keep it as long as the process lives.
    """

    def _put(self, item: object) -> None:
        pass


class CannotBatch(SteerError):
    """transformers cannot serve this model in a continuous batch. The message says why."""


def start_manager(
    model: PreTrainedModel, *, context: int, page: int | None, cache_tokens: int | None, batch_tokens: int | None
) -> ContinuousBatchingManager:
    """Return a warmed-up `ContinuousBatchingManager` with its processor.

    Args:
        model: the model.
        context: the most tokens of a prompt and its answer.
        page: the page size of the cache in tokens; None for the choice of transformers.
        cache_tokens: the size of the cache in tokens; None for the choice of transformers.
        batch_tokens: the most tokens of a pass; None for the choice of transformers.

    Raises:
        CannotBatch: transformers cannot batch the model. Nothing has changed then.
    """
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
    """Raise UnsupportedModel if the manager of this version lacks attributes that Steer uses. The error names them
    all."""
    processor = getattr(manager, "batch_processor", None)
    missing = [f"ContinuousBatchingManager.{name}" for name in _MANAGER if not _has(manager, name)]
    missing += [f"ContinuousBatchProcessor.{name}" for name in _PROCESSOR if not _has(processor, name)]
    output = GenerationOutput("probe")
    missing += [f"GenerationOutput.{name}" for name in _OUTPUT if not _has(output, name)]
    if missing:
        raise UnsupportedModel(f"this version of transformers lacks {', '.join(missing)}, which Steer relies on")


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel if Steer cannot decode the model in the way `generate` does."""
    missing = [name for name in _MODEL if not _has(model, name)]
    if missing:
        raise UnsupportedModel(f"{type(model).__name__} lacks {', '.join(missing)}, which Steer decodes with")


def short(error: BaseException) -> str:
    """The type of `error` and the beginning of its message, which may contain a whole configuration."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def _has(thing: object, path: str) -> bool:
    """Whether `thing` has the dotted attribute `path`."""
    try:
        attrgetter(path)(thing)
    except AttributeError:
        return False
    return True


def pass_stream(processor: ContinuousBatchProcessor) -> AbstractContextManager[object]:
    """Make the stream of the batch's pass current, so that work which is enqueued inside comes before the pass."""
    return stream_context(processor.inputs_and_outputs.compute_stream)


def let_in(processor: ContinuousBatchProcessor) -> None:
    """Let the scheduler take waiting requests again after the cache was full. transformers does this when a request
    finishes, but a cancelled request never finishes."""
    processor.scheduler.block_new_requests = False


class Attention:
    """The attention implementations named by a model's configuration and by those of its parts. They must be put back,
    because a plain pass fails, or is wrong, under the implementations for a paged cache."""

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
        """Put the first implementations back for the code inside."""
        now = self._now()
        self._put(self._kept)
        try:
            yield
        finally:
            self._put(now)


def whole_cache(model: Any, cache: Any = None) -> bool:
    """Whether the model's cache consists of the keys and values of all tokens at every layer and nothing else: no
    window, no running state. If `cache` is None, the configuration tells the kind of cache."""
    try:
        cache = DynamicCache(config=model.config) if cache is None else cache
    except (AttributeError, KeyError, TypeError, ValueError):  # a kind of layer that DynamicCache does not know
        return False
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def move_back(cache: DynamicCache, by: Sequence[int]) -> None:
    """Move the keys and values of each row `by[row]` positions towards the end of a whole cache. The last `by[row]` of
    them are lost. The first `by[row]` positions then hold no valid values, and must be masked."""
    for layer in cache.layers:
        count = layer.keys.shape[-2]
        at = torch.arange(count, device=layer.keys.device) - torch.tensor(by, device=layer.keys.device)[:, None]
        at = (at % count)[:, None, :, None]
        layer.keys = torch.take_along_dim(layer.keys, at, dim=2)
        layer.values = torch.take_along_dim(layer.values, at, dim=2)


def shared_cache(cache: object) -> object | None:
    """Return `cache` if it is paged and shares blocks between requests that begin with the same tokens, else None."""
    return cache if getattr(cache, "use_prefix_sharing", False) else None


def past_of(given: Mapping[str, object]) -> Cache | None:
    """The cache from which a pass continues, among the keyword arguments of its decoder."""
    found = (given.get(name) for name in ("past_key_values", "cache_params"))
    return next((cache for cache in found if isinstance(cache, Cache)), None)


def forget_manager(model: PreTrainedModel) -> None:
    """Make the next `generate_batch` begin with an empty cache, also if `persistent_manager=True` has left a manager. A
    running manager is not touched."""
    manager = vars(model).get("_cached_continuous_batching_manager")
    if manager is not None and not manager.is_running():
        model.destroy_cached_continuous_batching_manager()


def logits_in_pieces(model: Any, ids: Tensor, size: int) -> Generator[Tensor]:
    """Yield the logits at all of `ids` (`[1, tokens]`) but the last, `[tokens, vocabulary]` for `size` tokens at once.

    If the model can return a part of its logits, the pass goes through the decoder once and through the head for each
    piece. Else all logits are computed at once.
    """
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
    """The settings of a configuration's rotary embedding, and those of each kind of layer if there are several."""
    given = (getattr(config, name, None) for name in ("rope_parameters", "rope_scaling"))
    whole = [each for each in given if isinstance(each, dict)]
    return [one for each in whole for one in (each, *each.values()) if isinstance(one, dict)]


def length_dependent(config: PreTrainedConfig) -> tuple[str, int] | None:
    """The kind of the rotary embedding whose frequencies depend on the longest request of a pass, and the length in
    tokens up to which they do not. Of several, the one with the smallest length. None if there is none."""
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
    """The most tokens of a text that shares a pass with other texts. With more tokens its results, or those of the
    other texts, would change."""
    found = length_dependent(config)
    return found[1] if found else math.inf


def everywhere(config: PreTrainedConfig, name: str) -> int | None:
    """The number `name` of the configuration; None if it has none, or a separate number for each layer."""
    try:
        found: int | None = getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return None
    return found


def lengths(config: PreTrainedConfig) -> list[int]:
    """The lengths in tokens above which the model treats a request differently: original context, windows, chunks."""
    text = config.get_text_config()
    names = ("original_max_position_embeddings", "sliding_window", "attention_chunk_size", "max_position_embeddings")
    given = [getattr(text, name, None) for name in names]
    given += [rotary.get(names[0]) for rotary in _rotary_embeddings(text)]
    return sorted({int(length) for length in given if isinstance(length, int | float) and length > 0})


#: Makes a context for a call of a model's method from the keywords of the call.
Around: TypeAlias = Callable[[Mapping[str, Any]], AbstractContextManager[None]]


def record_last(module: nn.Module) -> None:
    """Move the hooks by which transformers records the module's output behind all other hooks, because these may change
    the output."""
    hooks = module._forward_hooks
    for number in [number for number, hook in hooks.items() if getattr(hook, "__module__", None) == _RECORDERS]:
        hooks[number] = hooks.pop(number)


@dataclass(eq=False, frozen=True, slots=True)
class Call:
    """A call of a model's `generate`, with the identifier of the thread that made it."""

    thread: int


class Generations:
    """Records which calls of the model's `generate` are running, in all threads, until `remove`. It also calls
    `check(prompts, each)` before a call makes `each` > 1 rows of every prompt."""

    def __init__(self, model: PreTrainedModel, check: Callable[[int, int], None]) -> None:
        self.check = check
        self._model = model
        self._running: set[Call] = set()
        self._watched: list[tuple[_Watched, Around]] = []
        watching = ((_EXPAND, self._expanding), (_GENERATE, self._generating))
        for name, around in watching if hasattr(model, _EXPAND) else ():  # else the model cannot generate
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
    """Replaces a model's method `name`, and enters the contexts of `watchers` around each call. A copy of the model has
    its own method there, without watchers."""

    def __init__(self, model: PreTrainedModel, name: str, method: Callable[..., object]) -> None:
        functools.update_wrapper(self, method)
        self.watchers: list[Around] = []
        self._method, self._place, self._name = method, vars(model), name
        # in a copy of a watched model, the attribute is only the method of its class
        of_class = getattr(method, "__func__", None) is getattr(type(model), name, None)
        self._own = {name: method} if name in self._place and not of_class else {}
        self._place[name] = self

    def leave(self, around: Around) -> None:
        """Remove a watcher. After the last one, the model gets its original method back. If another wrapper was put
        around this object meanwhile, it stays inside of that wrapper, and does nothing."""
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
    """Decodes one request as `generate` does, a token at a time, with the cache and inputs that `generate` makes."""

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> None:
        def take(_model: PreTrainedModel, input_ids: Tensor, **prepared: object) -> tuple[Tensor, dict[str, object]]:
            """Replaces the loop of `generate`: returns the prepared inputs."""
            for name in ("logits_processor", "stopping_criteria", "generation_config"):
                prepared.pop(name, None)
            return input_ids, prepared

        self._model, self._first = model, True
        self._ids, self._kept = model.generate(
            **_whole(model, prompt), generation_config=_greedy(max_tokens), custom_generate=take
        )

    @property
    def length(self) -> int:
        """The number of tokens of the prompt and the answer so far."""
        return int(self._ids.shape[1])

    def inputs(self) -> dict[str, Tensor]:
        """The inputs of the next forward pass: the new tokens, or all again if the model drops its cache."""
        new = None if self._first else 1
        made = self._model.prepare_inputs_for_generation(
            self._ids, next_sequence_length=new, is_first_iteration=self._first, **self._kept
        )
        self._first = False
        return made

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Make the forward pass. Returns the logits of the next token, `[1, vocabulary]` float32."""
        out = self._model(**inputs, return_dict=True)
        self._kept = self._model._update_model_kwargs_for_generation(out, self._kept)
        return out.logits[:, -1].float()

    def append(self, token: int) -> None:
        self._ids = torch.cat([self._ids, self._ids.new_tensor([[token]])], dim=-1)


class _Forced(LogitsProcessor):
    """Makes `generate` choose given tokens, even if its configuration forbids them."""

    def __init__(self, prompt: int, tokens: Sequence[int]) -> None:
        self._prompt, self._tokens = prompt, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self._tokens[input_ids.shape[1] - self._prompt]] = 0.0
        return chosen


def teacher_forced_logprobs(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The log-probabilities of `generate` when it is made to choose `tokens`, `[tokens, vocabulary]` float32."""
    out = model.generate(
        **_whole(model, prompt),
        generation_config=_greedy(len(tokens), output_logits=True, return_dict_in_generate=True),
        logits_processor=LogitsProcessorList([_Forced(len(prompt), tokens)]),
    )
    return torch.log_softmax(torch.stack([logits[0].float() for logits in out.logits]), -1)


def _whole(model: PreTrainedModel, prompt: Sequence[int]) -> dict[str, Tensor]:
    """The inputs for a prompt in which no token counts as padding, whatever its id."""
    ids = torch.tensor([list(prompt)], device=model.device)
    masked = "attention_mask" in inspect.signature(model.forward).parameters
    return {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})


def _greedy(count: int, **more: object) -> GenerationConfig:
    """A greedy configuration for exactly `count` tokens: no token ends the answer."""
    return GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=count, eos_token_id=[], pad_token_id=0, use_cache=True, **more
    )


class WeightLoading:
    """How transformers makes the parameters of `model` (on the meta device) from the tensors in its files."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._mapping = model, get_model_conversion_mapping(model)
        self._renamings = [each for each in self._mapping if isinstance(each, core_model_loading.WeightRenaming)]
        self._converters = [each for each in self._mapping if isinstance(each, core_model_loading.WeightConverter)]
        self._known = model.state_dict()

    def parameter(self, name: str) -> tuple[str, list[object]] | None:
        """The parameter that the tensor `name` of a file becomes (of several, the first), and the operations that make
        it from the tensor. None if the model has no such parameter."""
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
        """Load `tensors` of the files into the parameters that they become, in the dtypes of the model."""
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
    """Which dimension of a tensor in a file becomes the dimension `axis` of the parameter that is made from the tensor.

    Args:
        operations: the operations that make the parameter.
        axis: the dimension of the parameter, counted from the end.
        parameter: the shape of the parameter.
        file: the shape of the tensor in the file.

    Returns:
        The dimension of the tensor, counted from the end; None if it is not known.
    """
    dimensions = len(parameter)
    for operation in reversed(operations):
        if isinstance(operation, core_model_loading.MergeModulelist) and operation.dim == 0:
            dimensions -= 1  # the file holds experts one by one
        elif isinstance(operation, core_model_loading.Transpose):
            if operation.check_dims and tuple(file) == tuple(parameter):
                continue
            one, other = (d - dimensions if d >= 0 else d for d in (operation.dim0, operation.dim1))
            axis = {one: other, other: one}.get(axis, axis)
        else:
            return None
    return axis if dimensions == len(file) else None
