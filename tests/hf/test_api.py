"""`steer.attach`: never silently plain, never a row steered as another was to be, whatever is around the model."""

from __future__ import annotations

import asyncio
import copy
import gc
import hashlib
import inspect
import io
import json
import logging
import pickle
import pydoc
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import peft
import pytest
import torch
import torch.utils.checkpoint
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import steer
from steer.errors import DirectionError, InvalidInput, NoRoom, NotFinite, SpecError, UnknownDirection, UnsupportedModel
from steer.hf.steering import Anatomy, Steering
from steer.names import MODES
from steer.runtime.hook_points import on_output
from tests import models
from tests.oracle import ablated

IDS = torch.randint(3, models.VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(7))
GREEDY: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.tiny("llama")


@pytest.fixture(scope="module")
def d(llama: Any) -> steer.Direction:
    return models.direction(llama, seed=1)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def changed(got: Tensor, plain: Tensor) -> list[bool]:
    """For each row, whether all of its positions differ from the plain pass; a row of which some do is a failure."""
    positions = (got != plain).any(-1)
    assert ((positions.all(1)) | ~positions.any(1)).all(), "steered in part"
    return positions.all(1).tolist()


# -- attached and not ------------------------------------------------------------------------------------------------


def test_attached_at_once_and_until_detach(llama: Any, d: steer.Direction) -> None:
    plain = logits(llama)
    steering = steer.attach(llama, {"d": d})
    with steering("d"):
        assert all(changed(logits(llama), plain))
    assert torch.equal(logits(llama), plain)
    steering.detach()
    steering.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())
    for use in (lambda: steering("d"), lambda: steering.read("d").__enter__()):
        with pytest.raises(RuntimeError, match="detached"):
            use()
    with steering, steering("d"):
        assert all(changed(logits(llama), plain))
    with pytest.raises(RuntimeError, match="detached"):
        steering("d")


@pytest.mark.parametrize("held", [False, True])
def test_a_forgotten_with_stops_the_next_pass(llama: Any, d: steer.Direction, held: bool) -> None:
    """Also in a notebook, which keeps what a line gave."""
    plain = logits(llama)
    with steer.attach(llama, {"d": d}) as steering:
        kept = [steering("d=0.5")]
        if not held:
            kept.clear()
        with pytest.raises(RuntimeError, match=r"steering\('d=0.5'\) was called without `with`"):
            llama.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
        assert torch.equal(logits(llama), plain), "told once"
        with steering("off"):
            steering("d")
            with pytest.raises(RuntimeError, match="without `with`"):
                logits(llama)


def test_a_forgotten_with_on_what_nobody_holds(llama: Any, d: steer.Direction) -> None:
    steer.attach(llama, {"d": d})("d")
    gc.collect()
    with pytest.raises(RuntimeError, match="without `with`"):
        logits(llama)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_that_overflows_is_told_at_the_end_of_its_block(dtype: torch.dtype) -> None:
    model = models.tiny("llama", dtype)
    plain, wild = logits(model), models.direction(model, seed=1, shared=True)
    weight = 18.0 if dtype == torch.float16 else 1e12
    wild = replace(wild, weights=torch.full_like(wild.weights, weight))
    with steer.attach(model, {"wild": wild, "d": models.direction(model, seed=2)}) as steering:
        with pytest.raises(NotFinite, match=r"spec 1 of 3.*less strength"), steering("off", "wild=-10", "d"):
            beside = logits(model)
        assert torch.equal(beside[:2], plain[:2]), "its neighbours are as ever"
        assert beside.isfinite().all()

        def inside(error: Exception | None) -> None:
            with steering("wild=-10"):
                logits(model)
                with steering("d"):
                    logits(model)
                if error:
                    raise error

        with pytest.raises(NotFinite, match="where it is so unsteered too"), steering("d=0.000001"):
            model(inputs_embeds=torch.full((1, 2, models.D_MODEL), torch.nan, dtype=dtype))

        with pytest.raises(NotFinite):  # what the outer block has lost is not forgotten in the inner one
            inside(None)
        with pytest.raises(KeyError):  # an error of the block's own goes before
            inside(KeyError())
        with steering("wild=0.000001"):
            logits(model)
        with steering("off"):
            assert torch.equal(logits(model), plain)


def test_a_block_may_be_entered_again(llama: Any, d: steer.Direction) -> None:
    plain = logits(llama)
    with steer.attach(llama, {"d": d}) as steering:
        block = steering("d")
        for _ in range(2):
            with block:
                first = logits(llama)
                with block:
                    assert torch.equal(logits(llama), first)
            assert all(changed(first, plain))
            assert torch.equal(logits(llama), plain)


def test_no_pass_in_a_block_is_told(llama: Any, d: steer.Direction) -> None:
    other = copy.deepcopy(llama)
    with steer.attach(llama, {"d": d}) as steering, pytest.warns(RuntimeWarning, match="no pass of the attached model"):
        with steering("d"):
            logits(other)


def test_an_exception_in_a_block_ends_it(llama: Any, d: steer.Direction) -> None:
    plain = logits(llama)
    with steer.attach(llama, {"d": d}) as steering:
        with pytest.raises(KeyError), steering("d"):
            raise KeyError
        assert torch.equal(logits(llama), plain)
        with pytest.raises(UnknownDirection, match="'e' is not served; served: d"):
            steering("e")
        with pytest.raises(SpecError, match="no spec"):
            steering()
        assert torch.equal(logits(llama), plain)


def test_detaching_inside_a_block_is_refused(llama: Any, d: steer.Direction) -> None:
    steering = steer.attach(llama, {"d": d})
    with steering("d"):
        steered = logits(llama)
        with pytest.raises(RuntimeError, match=r"`with steering\('d'\):` of this steering is open"):
            steering.detach()
        assert torch.equal(logits(llama), steered)
    steering.detach()


def test_two_on_one_model_and_a_cell_that_is_run_again(llama: Any, d: steer.Direction) -> None:
    plain = logits(llama)
    e = models.direction(llama, seed=2)
    with steer.attach(llama, {"d": d, "e": e}) as steering:
        with steering("d"):
            one = logits(llama)
    first, second = steer.attach(llama, {"d": d}), steer.attach(llama, {"d": e})
    with first("d"):
        assert torch.equal(logits(llama), one)
        with second("d"):
            both = logits(llama)
    assert all(changed(both, one))
    second.detach()
    with first("d"):
        assert torch.equal(logits(llama), one)
    hooks = sum(len(m._forward_hooks) for m in llama.modules())
    first = steer.attach(llama, {"d": d})
    gc.collect()
    assert sum(len(m._forward_hooks) for m in llama.modules()) == hooks
    del first
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())
    assert torch.equal(logits(llama), plain)


def test_a_replaced_block_is_seen(d: steer.Direction) -> None:
    model = models.tiny("llama")
    with steer.attach(model, {"d": d}) as steering:
        model.model.layers[1] = copy.deepcopy(models.tiny("llama").model.layers[1])
        with pytest.raises(RuntimeError, match="no longer on the model"):
            steering("d")
        del steering


def replace_one(model: Any) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])


def replace_all(model: Any) -> None:
    model.model.layers = nn.ModuleList(copy.deepcopy(block) for block in model.model.layers)


def prune(model: Any) -> None:
    model.model.layers = model.model.layers[:2]


def clear(model: Any) -> None:
    model.model.layers[2]._forward_hooks.clear()


def anew(model: Any) -> None:
    model.model.layers[2]._forward_hooks = type(model.model.layers[2]._forward_hooks)()


def append(model: Any) -> None:
    model.model.layers.append(copy.deepcopy(model.model.layers[-1]))
    model.config.num_hidden_layers += 1


def insert(model: Any) -> None:
    model.model.layers.insert(2, copy.deepcopy(model.model.layers[1]))
    model.config.num_hidden_layers += 1


def swap(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def swap_in_another_list(model: Any) -> None:
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


@pytest.mark.parametrize(
    "change", [replace_one, replace_all, prune, clear, anew, append, insert, swap, swap_in_another_list]
)
@pytest.mark.parametrize("what", ["steered", "read"])
def test_no_pass_of_a_block_goes_without_hooks(d: steer.Direction, change: Any, what: str) -> None:
    """Also where the change comes inside the block, before the first pass or after it."""
    model = models.tiny("llama")
    steering = steer.attach(model, {"d": d})

    def inside() -> None:
        with steering("d") if what == "steered" else steering.read("d"):
            logits(model)
            change(model)
            with pytest.raises(RuntimeError, match="no longer on the model"):
                logits(model)

    with pytest.raises(RuntimeError, match="no longer on the model"):
        inside()
    logits(model)  # plain, as everything behind the block


def test_a_decoder_that_is_replaced_in_a_block_is_seen(d: steer.Direction) -> None:
    """Its passes come to no hook."""
    model = models.tiny("llama")
    steering = steer.attach(model, {"d": d})

    def inside() -> None:
        with steering("d"):
            logits(model)
            model.model = copy.deepcopy(model.model)
            logits(model)

    with pytest.raises(RuntimeError, match="no longer on the model"):
        inside()


def test_a_block_that_gets_another_around_it_is_steered_as_before(d: steer.Direction) -> None:
    model = models.tiny("llama")
    with steer.attach(model, {"d": d}) as steering, steering("d"):
        steered = logits(model)
        model.model.layers[1] = cast(nn.Module, torch.compile(model.model.layers[1], backend="eager"))
        torch.testing.assert_close(logits(model), steered)
        model.model.layers = nn.ModuleList(model.model.layers)
        torch.testing.assert_close(logits(model), steered)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("what", ["steered", "read"])
def test_a_block_is_not_exported_without_its_steering(d: steer.Direction, what: str, strict: bool) -> None:
    model = models.tiny("llama")
    with steer.attach(model, {"d": d}) as steering:
        program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}).module()
        torch.testing.assert_close(program(input_ids=IDS, use_cache=False).logits, logits(model))
        with steering("d") if what == "steered" else steering.read("d"):
            logits(model)
            with pytest.raises(Exception, match=r"would lose its steering|torch\.compiler\.disable"):
                torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=strict)


@pytest.mark.filterwarnings("ignore:.*performance drop.*batching rule:UserWarning")
def test_transforms_of_functions_are_steered(d: steer.Direction) -> None:
    model = models.tiny("llama")
    embedded = model.get_input_embeddings()(IDS)

    def of(embeddings: Tensor) -> Tensor:
        out: Tensor = model(inputs_embeds=embeddings, use_cache=False).logits
        return out

    with steer.attach(model, {"d": d}) as steering, steering("d:one_sided=0.7"):
        with torch.enable_grad():
            given = embedded.clone().requires_grad_()
            (wanted,) = torch.autograd.grad(of(given)[:, -1].square().sum(), given)
            found = torch.func.grad(lambda x: of(x)[:, -1].square().sum())(embedded)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.vmap(lambda x: of(x[None])[0])(embedded), of(embedded))
        torch.testing.assert_close(of(embedded), logits(model))
    wild = replace(d, weights=torch.full_like(d.weights, 1e12))
    with steer.attach(model, {"wild": wild}) as steering, pytest.raises(NotFinite), steering("wild=-10"):
        torch.vmap(lambda x: of(x[None])[0])(embedded)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_block_is_not_traced_with_its_steering_for_good(d: steer.Direction) -> None:
    model = models.tiny("llama")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return logits(self.model, ids)

    with steer.attach(model, {"d": d}) as steering, steering("d"):
        logits(model)
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would keep it for good"):
            torch.jit.trace(Logits(), (IDS,), check_trace=False)


def batched(model: Any, **options: Any) -> list[list[int]]:
    """Greedy answers by continuous batching."""
    config = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=64)
    greedy = tf.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(IDS[:2].tolist(), greedy, config, **options)
    return [one.generated_tokens for one in found.values()]


@pytest.mark.parametrize("kept", [False, True])
def test_no_answer_begins_with_what_was_computed_under_another_steering(d: steer.Direction, kept: bool) -> None:
    """Requests of continuous batching share the blocks of equal beginnings, also with those of an earlier call."""
    model = models.tiny("llama")
    plain = batched(model, persistent_manager=kept)
    with steer.attach(model, {"d": d}) as steering:
        with steering("d"):
            steered = batched(model)
        assert steered != plain
        for _ in range(2):
            with steering("d"):
                assert batched(model, persistent_manager=kept) == batched(model, persistent_manager=kept) == steered
            assert batched(model, persistent_manager=kept) == plain
        with steering("d"):
            batched(model, persistent_manager=kept)
    assert batched(model, persistent_manager=kept) == plain


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_that_goes_from_one_steering_to_another_is_told(d: steer.Direction, static: bool) -> None:
    model = models.tiny("llama")

    def made() -> Any:
        return tf.StaticCache(model.config, 64) if static else tf.DynamicCache(config=model.config)

    with steer.attach(model, {"d": d}) as steering:
        cache = made()
        for turn in (IDS[:, :6], IDS[:, 6:]):
            with steering("d"):  # a block for each turn of a chat
                model(turn[:, :2], past_key_values=cache)
                model(turn[:, 2:], past_key_values=cache)
        with pytest.warns(RuntimeWarning, match="filled under another steering"):
            model(IDS[:, 6:], past_key_values=cache)
        model(IDS[:, 6:], past_key_values=cache)  # told once
        with steering("off"):  # plain as well
            model(IDS[:, 6:], past_key_values=cache)
        for spec in ("d", "off", "d"):
            with steering(spec):
                model.generate(IDS, **GREEDY, **({"cache_implementation": "static"} if static else {}))


def test_a_pass_that_fails_on_another_thread_ends_its_block_with_the_error(d: steer.Direction) -> None:
    """`generate_batch` gives no answers then, and raises nothing."""
    model = models.tiny("llama")
    with steer.attach(model, {"d": d}) as steering:
        with pytest.raises(InvalidInput, match="2 specs for a pass of 1 rows"), steering("off", "d"):
            assert batched(model) == [[], []]
        config = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=64)
        greedy = tf.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
        with model.continuous_batching_context_manager(greedy, continuous_batching_config=config) as manager:

            def asked() -> Any:
                manager.add_request(IDS[0].tolist())
                return manager.get_result(timeout=60)

            assert asked().generated_tokens
            with pytest.raises(InvalidInput, match="filled under another steering"), steering("d"):
                assert asked().error


@pytest.mark.parametrize("sites", [("resid_post",), ("resid_post", "writers")])
@pytest.mark.parametrize("around", [[1], [0, 1], [0, 1, 2]])
@pytest.mark.parametrize("what", ["steered", "read"])
def test_a_pass_that_goes_around_blocks_is_told(d: steer.Direction, what: str, around: list[int], sites: Any) -> None:
    """As decode steps do that call `forward` of blocks, or what was captured of them."""
    model = models.tiny("llama")

    class Around(type(model.model.layers[0])):
        def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.shape[1] == 1:
                return x
            return super().__call__(x, *args, **kwargs)

    for layer in around:
        model.model.layers[layer].__class__ = Around
    steering = steer.attach(model, {"d": d}, sites=sites)

    def block() -> Any:
        return steering("d") if what == "steered" else steering.read("d")

    def inside() -> None:
        with block():
            logits(model)
            logits(model, IDS[:, :1])

    with pytest.raises(RuntimeError, match="went around"):
        inside()
    logits(model, IDS[:, :1])
    model.train()  # where layers may be dropped
    inside()


def test_a_pass_may_end_early_and_an_error_in_it_is_told_alone(d: steer.Direction) -> None:
    model = models.tiny("llama")
    steering = steer.attach(model, {"d": d})
    with steering("d"):
        model.config.num_hidden_layers = 2
        logits(model)
        model.config.num_hidden_layers = models.LAYERS
        handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model)
        handle.remove()
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: logits(model), range(8)))


@pytest.mark.parametrize("name", ["generate", "_expand_inputs_for_generation"])
def test_what_is_around_the_models_own_methods_stays(d: steer.Direction, name: str) -> None:
    """What was put on a model before `attach`, and what was put on it since."""
    model, calls = models.tiny("llama"), list[str]()
    given: dict[str, Any] = dict(
        input_ids=IDS[:2], attention_mask=torch.ones_like(IDS[:2]), **GREEDY | {"num_beams": 2}
    )

    def put(what: str) -> Any:
        method = getattr(model, name)

        def around(*args: Any, **kwargs: Any) -> Any:
            calls.append(what)
            return method(*args, **kwargs)

        setattr(model, name, around)
        return around

    def called() -> list[str]:
        calls.clear()
        model.generate(**given)
        return calls

    first = put("first")
    steer.attach(model, {"d": d}).detach()
    assert vars(model)[name] is first
    steering = steer.attach(model, {"d": d})
    second = put("second")
    other = steer.attach(model, {"d": d})
    for attached in (steering, other):
        with attached("d"):
            assert called() == ["second", "first"]
    with pytest.raises(InvalidInput, match="3 specs for 2 prompts"), steering("off", "d", "off"):
        called()
    steering.detach()
    assert called() == ["second", "first"]
    with pytest.raises(InvalidInput, match="3 specs for 2 prompts"), other("off", "d", "off"):
        called()
    other.detach()
    assert vars(model)[name] is second
    assert called() == ["second", "first"]
    setattr(model, name, first)
    steering = steer.attach(model, {"d": d})
    steering.detach()
    assert vars(model)[name] is first


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_hidden_states_are_those_that_blocks_hand_on(name: str) -> None:
    """Whether the model was asked for them before `attach` or after, and again after another one."""
    model = models.tiny(name)
    d = models.direction(model, seed=1)

    def states() -> Tensor:
        return torch.stack(model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states[:-1])

    with steer.attach(model, {"d": d}) as steering, steering("d"):
        first = states()
    plain = states()
    for layer in range(1, models.LAYERS):
        assert float((first[layer] @ d.directions[layer - 1, 0]).abs().max()) < 1e-4
    for again in (steering, steer.attach(model, {"d": d})):
        with again, again("d"):
            torch.testing.assert_close(states(), first)
        assert torch.equal(states(), plain)


def test_attaching_inside_a_block_names_the_block(llama: Any, d: steer.Direction) -> None:
    with steer.attach(llama, {"d": d}) as steering:
        for block, says in (
            (lambda: steering("off", "d"), r"`with steering\('off', 'd'\):` of another steering is open"),
            (lambda: steering("d"), r"`with steering\('d'\):`"),
            (lambda: steering.read("d"), r"`with steering.read\('d'\):`"),
        ):
            with cast(Any, block()):
                with pytest.raises(RuntimeError, match=says):
                    steer.attach(llama, {"d": d})
                steer.attach(copy.deepcopy(llama), {"d": d}).detach()
                logits(llama)


def test_an_error_is_told_also_where_a_generator_holds_a_block(llama: Any, d: steer.Direction) -> None:
    def blocks() -> Generator[None]:
        with steering("d"):
            logits(llama)
            yield

    steering = steer.attach(llama, {"d": d})
    held = blocks()

    def inside() -> None:
        with steering:
            next(held)
            raise KeyError

    with pytest.raises(KeyError) as caught:
        inside()
    assert "`with steering('d'):` of this steering is open, so that this steering stays" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"`with steering\('d'\):` of this steering is open"):
        steering.detach()
    held.close()
    steering.detach()


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_rows_are_steered_whole_or_the_pass_is_refused(name: str) -> None:
    model = models.tiny(name)
    plain = logits(model)
    with steer.attach(model, {"d": models.direction(model)}) as steering:
        with steering("off", "d", "d=0.5"):
            assert changed(logits(model), plain) == [False, False, True, True, True, True]
            for rows in (1, 2, 4, 5):  # as the last batch of a loader
                with pytest.raises(InvalidInput, match=f"3 specs for a pass of {rows} rows"):
                    logits(model, IDS[:rows])
                with pytest.raises(InvalidInput, match=f"3 specs for a pass of {rows} rows"):
                    model(inputs_embeds=model.get_input_embeddings()(IDS[:rows]), use_cache=False)
            assert changed(logits(model), plain) == [False, False, True, True, True, True]
        with steering("off", "off", "d=5", "off"), pytest.raises(InvalidInput, match="4 specs for a pass of 6 rows"):
            logits(model)
        with steering("d"):
            assert changed(logits(model, IDS[:5]), plain[:5]) == [True] * 5


def test_generation_follows_its_row(llama: Any, d: steer.Direction) -> None:
    """With left padding, a cache, beams and several answers: each as when its prompt is alone with its spec."""
    ids, mask = IDS[:2].clone(), torch.ones(2, IDS.shape[1], dtype=torch.long)
    ids[0, :3], mask[0, :3] = 0, 0
    with steer.attach(llama, {"d": d}) as steering:
        for more in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            with steering("off", "d"):
                together = llama.generate(ids, attention_mask=mask, **GREEDY, **more).view(2, -1, 15)
            for row, spec in enumerate(("off", "d")):
                with steering(spec):
                    alone = llama.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **GREEDY, **more)
                assert torch.equal(together[row], alone)
        with steering("off", "d"), pytest.raises(InvalidInput, match="2 specs for a pass of 3 rows"):
            llama.generate(IDS[:3], attention_mask=torch.ones_like(IDS[:3]), **GREEDY)


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("prompts", [1, 3])
def test_beams_and_answers_of_one_prompt_are_never_parted(
    llama: Any, d: steer.Direction, prompts: int, more: dict[str, Any]
) -> None:
    """Two specs divide the rows, and would part those of one prompt."""
    ids = IDS[:prompts]
    asked: dict[str, Any] = dict(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY | more)
    said = f"2 specs for {prompts} prompts of 2 beams or answers each"
    with steer.attach(llama, {"d": d}) as steering, steer.attach(llama, {"e": d}) as outer:
        with pytest.raises(InvalidInput, match=said), steering("off", "d"):
            llama.generate(**asked)
        with pytest.raises(InvalidInput, match=said), outer("off", "e"), steering("d"):
            llama.generate(inputs_embeds=llama.get_input_embeddings()(ids), **asked | {"input_ids": None})
        with outer("e"), steering(*["d"] * prompts):
            assert len(llama.generate(**asked)) in (prompts, 2 * prompts)
        steering.detach()
        outer.detach()
        with steering:
            pass
    assert "_expand_inputs_for_generation" not in vars(llama)


def test_blocks_end_in_any_order(llama: Any, d: steer.Direction) -> None:
    """As those of two generators that are run by turns do: what is open is in force, and nothing behind the last."""
    plain = logits(llama)
    with steer.attach(llama, {"d": d}) as steering:
        with steering("d=0.5"):
            half = logits(llama)
        with steering("d"):
            whole = logits(llama)
        first, second = steering("d"), steering("d=0.5")
        first.__enter__()
        second.__enter__()
        assert torch.equal(logits(llama), half)
        first.__exit__(None, None, None)
        assert torch.equal(logits(llama), half)
        second.__exit__(None, None, None)
        assert torch.equal(logits(llama), plain)
        first.__enter__()
        second.__enter__()
        assert torch.equal(logits(llama), half)
        second.__exit__(None, None, None)
        assert torch.equal(logits(llama), whole)
        first.__exit__(None, None, None)
        assert torch.equal(logits(llama), plain)


@pytest.mark.parametrize("specs", [("d",), ("off", "d")])
def test_gradients_are_those_of_the_pass_also_behind_the_block(d: steer.Direction, specs: tuple[str, ...]) -> None:
    model = models.tiny("llama")

    def gradients(inside: bool) -> list[Tensor]:
        model.zero_grad()
        with torch.enable_grad():
            with steering(*specs):
                loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    with steer.attach(model, {"d": d}) as steering:
        for x, y in zip(gradients(inside=True), gradients(inside=False), strict=True):
            assert torch.equal(x, y)


def checkpoint(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()


def loss_of(model: Any, ids: Tensor = IDS) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def taken(model: Any) -> list[Tensor]:
    """Its gradients, which it has no longer then."""
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("behind", ["off", "d=0.5", None])
@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_pass_is_not_computed_again_under_another_steering(
    d: steer.Direction, behind: str | None, passes: int, reentrant: bool
) -> None:
    """Also where other passes have begun since, also in one backward with them."""
    model = models.tiny("llama").train()
    with steer.attach(model, {"d": d}) as steering, torch.enable_grad():
        checkpoint(model, reentrant)
        for _ in range(2):
            with steering("d"):
                loss_of(model).backward()
                loss = loss_of(model)
            with steering(behind) if behind else nullcontext():
                for _ in range(passes):
                    loss = loss + loss_of(model)
                model(input_ids=IDS)
                with pytest.raises(RuntimeError, match="under another steering"):
                    loss.backward()
        loss_of(model).backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the pass without gradients
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_pass_is_computed_again_under_its_own_steering(d: steer.Direction, reentrant: bool) -> None:
    """With the gradients and the readings of a model that keeps its activations, whatever ran in between."""

    def trained(model: Any, steering: Any) -> tuple[list[Tensor], Any]:
        with steering("off", "d"), steering.read("d") as reading:
            first = loss_of(model)
            with steering("d=0.5"):
                loss_of(model, IDS[:2]).backward()
                with torch.no_grad():
                    loss_of(model)
            loss_of(model, IDS[:4])
            (first + loss_of(model, IDS[:2])).backward()
        return taken(model), reading

    bare, model = models.tiny("llama").train(), models.tiny("llama").train()
    with torch.enable_grad(), steer.attach(bare, {"d": d}) as plain, steer.attach(model, {"d": d}) as steering:
        checkpoint(model, reentrant)
        for _ in range(2):
            (expected, read), (got, again) = trained(bare, plain), trained(model, steering)
            for x, y in zip(expected, got, strict=True):
                torch.testing.assert_close(x, y)
            for mine, other in zip(read.passes, again.passes, strict=True):
                np.testing.assert_allclose(mine.before, other.before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_model_computes_it_again_under_its_own_steering(
    d: steer.Direction, reentrant: bool
) -> None:
    """Or says that it cannot tell: such a node may be of what came behind another pass."""
    model = models.tiny("llama").train()

    def run(checkpointed: bool) -> Tensor:
        x = model.get_input_embeddings()(IDS)
        if not checkpointed:
            return loss(x)
        out: Any = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=reentrant)
        return cast(Tensor, out)

    def loss(x: Tensor) -> Tensor:
        out: Tensor = model(inputs_embeds=x, labels=IDS, use_cache=False).loss
        return out

    with torch.enable_grad(), steer.attach(model, {"d": d}) as steering:
        with steering("d"):
            run(False).backward()
            expected = taken(model)
            run(True).backward()
            for x, y in zip(expected, taken(model), strict=True):
                torch.testing.assert_close(x, y)
            left = run(True)
        with steering("off"):
            run(False)
            with pytest.raises(RuntimeError, match="no longer known"):
                left.backward()
        model.zero_grad()
        if not reentrant:
            with steering("off"):
                run(True).backward()


def test_tasks_of_one_loop_are_not_steered_by_each_other(llama: Any, d: steer.Direction) -> None:
    """A block that is open while another task runs, as a server's handlers are."""
    plain = logits(llama)

    async def asked(spec: str, turns: int) -> Tensor:
        with steering(spec):
            for _ in range(turns):
                await asyncio.sleep(0)
            return logits(llama)

    async def both() -> Any:
        return await asyncio.gather(asked("d", 2), asked("d=0.5", 4), return_exceptions=True)

    with steer.attach(llama, {"d": d}) as steering:
        with steering("d"):
            whole = logits(llama)
        first, second = asyncio.run(both())
        assert torch.equal(first, whole)
        assert isinstance(second, RuntimeError)
        assert "another thread or asyncio task" in str(second)
        assert torch.equal(logits(llama), plain)


class Halted:
    """A `generate` in another thread, halted after its first token until `may_end`."""

    def __init__(self, model: Any) -> None:
        begun, self.may_end = threading.Event(), threading.Event()

        class Waits(tf.StoppingCriteria):
            def __call__(_, *__: Any, **___: Any) -> Any:
                begun.set()
                self.may_end.wait(60)
                return torch.ones(1, dtype=torch.bool)

        given = GREEDY | {"stopping_criteria": [Waits()]}
        self._thread = threading.Thread(target=model.generate, args=(IDS[:1],), kwargs=given)
        self._thread.start()
        assert begun.wait(60)

    def end(self) -> None:
        self.may_end.set()
        self._thread.join()


def test_a_generation_in_a_thread_is_steered_as_a_whole_or_told(llama: Any, d: steer.Direction) -> None:
    """As with a streamer: what is still under way where the block ends would go on plain, and what was under way before
    it would be steered from the middle on."""
    with steer.attach(llama, {"d": d}) as steering:
        with pytest.raises(RuntimeError, match="under way at the end of the block"), steering("d"):
            late = Halted(llama)
        with pytest.raises(RuntimeError, match="from here on"), steering("d"):
            pytest.fail("entered")
        late.end()
        with steering("d"):
            Halted(llama).end()
        with steering("d"):
            llama.generate(IDS[:1], **GREEDY)


@pytest.mark.parametrize("around", ["read", "off"])
@pytest.mark.parametrize("inner", ["d", "read"])
def test_a_generation_in_a_thread_crosses_no_edge_of_an_inner_block(
    llama: Any, d: steer.Direction, around: str, inner: str
) -> None:
    with steer.attach(llama, {"d": d}) as steering:

        def block(kind: str) -> Any:
            return steering.read("d") if kind == "read" else steering(kind)

        with block(around):
            with pytest.raises(RuntimeError, match="under way at the end of the block"), block(inner):
                late = Halted(llama)
            with pytest.raises(RuntimeError, match="from here on"), block(inner):
                pytest.fail("entered")
            late.end()
            with block(inner):
                Halted(llama).end()


def test_a_block_may_stand_within_a_generation_of_its_thread_and_not_reach_out_of_it(
    llama: Any, d: steer.Direction
) -> None:
    """As in a criterion that asks the model something else."""
    plain, open_ = logits(llama), list[Any]()

    class Asks(tf.StoppingCriteria):
        def __call__(self, *_: Any, **__: Any) -> Any:
            with steering("d"):
                assert all(changed(logits(llama), plain))
            return torch.ones(1, dtype=torch.bool)

    class Enters(tf.StoppingCriteria):
        def __call__(self, *_: Any, **__: Any) -> Any:
            open_.append(steering("d"))
            open_[-1].__enter__()
            return torch.ones(1, dtype=torch.bool)

    with steer.attach(llama, {"d": d}) as steering:
        llama.generate(IDS[:1], **GREEDY, stopping_criteria=[Asks()])
        llama.generate(IDS[:1], **GREEDY, stopping_criteria=[Enters()])
        with pytest.raises(RuntimeError, match="began inside a `generate` that has ended"):
            open_[0].__exit__(None, None, None)


def test_a_pipeline_that_takes_prompts_one_by_one_is_refused_two_specs(llama: Any, d: steer.Direction) -> None:
    tokenizer = models.tokenizer()
    tokenizer.padding_side = "left"
    pipe = tf.pipeline("text-generation", model=llama, tokenizer=tokenizer, device="cpu")
    with steer.attach(pipe, {"d": d}) as steering:
        with steering("off", "d"), pytest.raises(InvalidInput, match="2 specs for a pass of 1 rows"):
            pipe(["ab", "cd"], max_new_tokens=3, do_sample=False)
        with steering("off", "d"):
            both = pipe(["ab", "cd"], max_new_tokens=3, do_sample=False, batch_size=2)
        with steering("d"):
            alone = pipe(["cd"], max_new_tokens=3, do_sample=False)
    assert both[1] == alone[0]


class Flattened(nn.Module):
    """A block that hands on `[tokens, d_model]`, as some expert and vision blocks do."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self.block, self.last = block, last

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        positions = kwargs["position_ids"].shape[1]
        out: Tensor = self.block(x.view(-1, positions, x.shape[-1]), *args, **kwargs)
        return out if self.last else out.flatten(0, 1)


def test_blocks_that_see_flattened_tokens(llama: Any, d: steer.Direction) -> None:
    model = copy.deepcopy(llama)
    plain = logits(model)
    with steer.attach(model, {"d": d}) as steering, steering("off", "d"):
        expected = logits(model)
    for i, block in enumerate(model.model.layers):
        flat: Any = Flattened(block, last=i == models.LAYERS - 1)
        flat.attention_type = getattr(block, "attention_type", "full_attention")
        model.model.layers[i] = flat
    assert torch.equal(logits(model), plain)
    with steer.attach(model, {"d": d}) as steering:
        with steering("off", "d"):
            torch.testing.assert_close(logits(model), expected)
        with steering("off", "off", "d", "off"), pytest.raises(InvalidInput, match="4 specs for a pass of 6 rows"):
            logits(model)


def test_a_model_with_its_positions_first_is_refused() -> None:
    """Two prompts of two tokens would else have each position steered by a prompt's spec."""
    config = tf.XLNetConfig(vocab_size=128, d_model=64, n_layer=3, n_head=4, d_inner=96)
    with pytest.raises(UnsupportedModel, match=r"which rows of a batch .* \[7, 8\] the stream is \[8, 7, 64\]"):
        steer.attach(tf.XLNetLMHeadModel(config).eval())


# -- what is around a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_is_compiled_and_has_run_is_steered(d: steer.Direction, in_place: bool) -> None:
    """Dynamo does not look for hooks that came after it compiled."""
    model = models.tiny("llama")
    with steer.attach(model, {"d": d}) as steering, steering("off", "d"):
        expected = logits(model)
    plain = logits(model)
    if in_place:
        model.compile(backend="eager")
    run = model if in_place else torch.compile(model, backend="eager")
    assert torch.equal(logits(run), plain)
    for _ in range(2):
        with steer.attach(run, {"d": d}) as steering:
            assert torch.equal(logits(run), plain)
            with steering("off", "d"):
                torch.testing.assert_close(logits(run), expected)
                with pytest.raises(InvalidInput, match="2 specs for a pass of 3 rows"):
                    logits(run, IDS[:3])
            with steering("d"), steering.read("d") as reading:
                logits(run)
            assert float(np.abs(reading.after).max()) < 1e-4 < float(np.abs(reading.before).max())
        assert torch.equal(logits(run), plain)


def test_what_is_steered_does_not_make_a_graph_again(d: steer.Direction) -> None:
    model = models.tiny("llama")
    compiled: list[object] = []

    def backend(graph: Any, _inputs: object) -> Any:
        compiled.append(graph)
        return graph.forward

    run = torch.compile(model, backend=backend)
    with steer.attach(run, {"d": d}) as steering:
        with steering("d"):
            logits(run)
            logits(run)
        before = len(compiled)
        for strength in (0.1, 0.2, 0.3, 0.4):
            with steering("off", f"d={strength}"):
                logits(run)
        logits(run)
    assert len(compiled) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_stay_in_force(d: steer.Direction) -> None:
    model = models.tiny("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.eval()
    plain = logits(adapted)
    with adapted.disable_adapter():
        assert all(changed(logits(adapted), plain))
    with steer.attach(adapted, {"d": d}) as steering:
        assert torch.equal(logits(adapted), plain)
        with steering("off", "d"):
            assert changed(logits(adapted), plain) == [False] * 3 + [True] * 3


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_an_adapter_that_comes_around_a_writer_later_is_not_left_plain() -> None:
    """What the adapter adds comes behind the hook on the module that it is around."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4)
    model = tf.OPTForCausalLM(tf.OPTConfig(vocab_size=128, **sizes)).eval()
    d = models.direction(model, shared=True, sites=("writers",))
    adapter = peft.LoraConfig(target_modules=["fc2"], init_lora_weights=False)
    with steer.attach(model, {"d": d}, sites=("writers",)) as steering:
        adapted = peft.get_peft_model(model, adapter).eval()
        with pytest.raises(RuntimeError, match="a writer has an adapter around it"), steering("d"):
            logits(adapted)
    with steer.attach(adapted, {"d": d}, sites=("writers",)) as steering, steering("d"):
        logits(adapted)


def test_offloaded_weights(d: steer.Direction, tmp_path: Path) -> None:
    import accelerate

    model = models.tiny("llama")
    with steer.attach(model, {"d": d}) as steering, steering("off", "d"):
        expected = logits(model)
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with steer.attach(model, {"d": d}) as steering, steering("off", "d"):
        torch.testing.assert_close(logits(model), expected)


def encoder() -> Any:
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    return tf.BertForMaskedLM(tf.BertConfig(**sizes)).eval()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: "owner/model", "'owner/model' is the name of a model: load it first"),
        (lambda m: Path("folder"), "'folder' is the name of a model: load it first"),
        (nn.DataParallel, r"DataParallel copies the model .* attach to its `\.module`"),
        (lambda m: nn.Linear(2, 2), "Linear is no model of transformers"),
        (lambda m: None, "NoneType is no model of transformers"),
        (lambda m: m.model, "LlamaModel is no causal language model with its head"),
        (lambda m: encoder(), "cannot use this model: BertForMaskedLM fills in masked tokens and generates no text"),
        (lambda m: models.tiny("gpt2").train(), r"training mode .* call model\.eval\(\)"),
    ],
)
def test_what_cannot_be_attached_to_is_named(llama: Any, make: Any, says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        steer.attach(make(llama))


def test_a_model_without_its_weights_is_named(llama: Any) -> None:
    with pytest.raises(UnsupportedModel, match="on the device meta, without its weights"):
        steer.attach(copy.deepcopy(llama).to("meta"))


def test_a_model_spread_over_devices_is_named(llama: Any) -> None:
    model = copy.deepcopy(llama)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    with pytest.raises(UnsupportedModel, match=r"spread over the devices 0, 1"):
        steer.attach(model)


def test_a_copy_of_an_attached_model_is_one(llama: Any, d: steer.Direction) -> None:
    ids, how = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    steering = steer.attach(llama, {"d": d})
    plain, again = logits(llama), copy.deepcopy(llama)
    with steering("d"):
        assert torch.equal(logits(again), plain)
        assert not torch.equal(logits(llama), plain)
    own, before = steer.attach(again, {"d": d}), llama.generate(ids, **how)
    for of in (steering, own):
        with torch.no_grad():
            again.lm_head.weight.mul_(-1)
        changed = models.tiny("llama")
        changed.load_state_dict(again.state_dict())
        assert torch.equal(again.generate(ids, **how), changed.generate(ids, **how))
        assert torch.equal(llama.generate(ids, **how), before)
        of.detach()
    with steer.attach(llama, {"d": d}) as steering, steer.attach(again, {"d": d}) as own:
        with own("d"):
            assert torch.equal(logits(llama), plain)
            assert not torch.equal(logits(again), plain)
            assert not steering._steering.generating
            assert not own._steering.generating
    assert "generate" not in vars(llama)
    assert "generate" not in vars(again)


def test_any_mapping_and_any_number_is_a_spec(llama: Any, d: steer.Direction) -> None:
    said = {"direction": "d", "strength": 0.5, "layers": 1}
    numbers = said | {"strength": np.float32(0.5), "layers": np.int64(1)}
    with steer.attach(llama, {"d": d}) as steering:
        with steering(said):
            expected = logits(llama)
        for spec in (MappingProxyType(numbers), [MappingProxyType(numbers)]):
            with steering(spec):
                assert torch.equal(logits(llama), expected)
        for wrong in (np.float32("nan"), np.bool_(True)):
            with pytest.raises(SpecError, match="strength"):
                steering({"direction": "d", "strength": wrong})


def test_what_does_not_fit_is_said_of_no_server(llama: Any, d: steer.Direction) -> None:
    with steer.attach(llama, {"d": d, "e": d}, rank=1) as steering:
        with pytest.raises(SpecError, match=r"needs 2 direction rows .* the rank here is 1: .* `rank=` in Python"):
            steering("d,e")
        with pytest.raises(SpecError, match="no tokenizer here"):
            steering("d@thinking")


@pytest.mark.parametrize("name", ["fit", "evaluate", "fitt"])
def test_a_command_that_is_asked_of_the_module_is_told_to_be_one(name: str) -> None:
    with pytest.raises(AttributeError) as told:
        getattr(steer, name)
    assert ("a command of `steer`" in str(told.value)) == (name != "fitt")


@pytest.mark.parametrize("write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
@pytest.mark.parametrize("part", ["", "model.layers.1"])
def test_an_attached_model_says_that_it_is_not_pickled(d: steer.Direction, write: Any, part: str) -> None:
    model = models.tiny("llama")
    steering = steer.attach(model, {"d": d})
    with pytest.raises(TypeError, match="detach first"):
        write(model.get_submodule(part))
    for another in (write, copy.deepcopy):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            another(cast(Any, steering))
    steering.detach()
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (lambda x: {"h": x}, "Shaped returns a dict: a tensor is expected"),
        (lambda x: (None, x), "Shaped returns a tuple of NoneType: a tensor is expected"),
        (lambda x: [x], "Shaped returns a list: a tensor is expected"),
    ],
)
def test_a_block_that_returns_no_stream_is_named(shape: Any, says: str) -> None:
    model = models.tiny("llama")

    class Shaped(type(model.model.layers[0])):
        """Whoever calls it knows where the stream is."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out = super().__call__(*args, **kwargs)
            return next(x for x in (out.values() if isinstance(out, dict) else out) if x is not None)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return shape(super().forward(*args, **kwargs))

    for block in model.model.layers:
        block.__class__ = Shaped
    with pytest.raises(UnsupportedModel, match=says):
        steer.attach(model)


def test_a_block_that_is_called_by_another_keyword_is_named() -> None:
    model = models.tiny("llama")
    block = model.model.layers[0]

    class Renamed(type(block)):
        def __call__(self, x: Tensor, **kwargs: Any) -> Any:
            return super().__call__(stream=x, **kwargs)

        def forward(self, stream: Tensor, **kwargs: Any) -> Any:
            return super().forward(stream, **kwargs)

    block.__class__ = Renamed
    with pytest.raises(UnsupportedModel, match=r"a block is called with stream, .* as `hidden_states`"):
        steer.attach(model)


@pytest.mark.parametrize(
    "order",
    [
        lambda ids, _: torch.arange(len(ids)).flip(0),
        lambda ids, _: torch.arange(len(ids)).roll(1),
        lambda ids, _: ids.sum(1).argsort(),
        lambda ids, _: (-ids[:, 0]).argsort(),
        lambda ids, mask: torch.arange(len(ids)) if mask is None else mask.sum(1).argsort(descending=True),
    ],
)
def test_a_decoder_whose_rows_change_places_inside_is_refused(order: Any) -> None:
    model = models.tiny("llama")
    inner = model.model.forward

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        new = order(input_ids, attention_mask)
        mask = None if attention_mask is None else attention_mask[new]
        out = inner(input_ids=input_ids[new], attention_mask=mask, use_cache=False)
        out.last_hidden_state = out.last_hidden_state[new.argsort()]
        return out

    model.model.forward = forward
    with pytest.raises(UnsupportedModel, match="its rows change places inside"):
        steer.attach(model)


def test_a_decoder_that_is_given_other_rows_is_refused() -> None:
    model = models.tiny("llama")

    class Flat(type(model.model)):
        def __call__(self, input_ids: Tensor, **_: Any) -> Any:
            out = super().__call__(input_ids=input_ids.reshape(1, -1), use_cache=False)
            out.last_hidden_state = out.last_hidden_state.reshape(*input_ids.shape, -1)
            return out

    model.model.__class__ = Flat
    with pytest.raises(UnsupportedModel, match=r"which rows of a batch .* \[1, \d+\] tokens for \d rows of 8"):
        steer.attach(model)


# -- directions and arguments ----------------------------------------------------------------------------------------


def test_directions_by_any_name_and_what_is_there(llama: Any, d: steer.Direction, tmp_path: Path) -> None:
    digest = d.save(tmp_path / "d.safetensors")
    steering = steer.attach(llama, {"rows": tmp_path / "d.safetensors", "sites": str(tmp_path / "d.safetensors")})
    assert list(steering.directions) == ["rows", "sites"]
    assert repr(steering) == (
        f"<steering of LlamaForCausalLM, attached, at resid_post: rows {digest[:12]}, sites {digest[:12]}>"
    )
    steering.load("a-b.c", d)
    steering.unload("rows")
    assert list(steering.directions) == ["a-b.c", "sites"]
    with pytest.raises(UnknownDirection):
        steering.unload("rows")
    with steering("a-b.c"):
        logits(llama)
    steering.detach()
    assert "detached" in repr(steering)


def test_a_refused_file_is_told_once(
    llama: Any, d: steer.Direction, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    other = models.direction(models.tiny("gpt2"))
    caplog.set_level(logging.INFO)
    with pytest.raises(DirectionError) as caught:
        steer.attach(llama, {"a": tmp_path / "bad.safetensors", "b": tmp_path / "none", "c": d})
    assert len(caught.value.problems) >= 2
    with pytest.raises(DirectionError) as caught:
        steer.attach(llama, {"a": other, "b": other.with_meta(d_model=64), "c": d})
    assert {problem[0] for problem in caught.value.problems} == {"a", "b"}
    steering = steer.attach(llama, {"c": d}, rows=1)
    with pytest.raises(NoRoom):
        steering.load("e", models.direction(llama, seed=3))
    assert list(steering.directions) == ["c"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("directions/refusal.safetensors",), "directions: str is not accepted: a mapping from names"),
        (({"d": 3},), "d: int is not accepted: a Direction or a path"),
        (({"of f": "x"},), "'of f'"),
        (({1: "x"},), "direction name 1 is not acceptable"),
        (({"d": "a\0b"},), "the path of a direction file"),
    ],
)
def test_wrong_directions_say_what_is_accepted(llama: Any, given: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        steer.attach(llama, *given)


def test_wrong_options_come_together(llama: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        steer.attach(llama, {}, sites="writers", rows=0, rank=1.5)  # type: ignore[arg-type]
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["sites", "rows", "rank"]
    wrong: Any = {"sites": [["writers"]], "rows": 10**9, "rank": 100_000}
    with pytest.raises(InvalidInput) as caught:
        steer.attach(llama, {}, **wrong)
    assert caught.value.problems == (
        "sites: [['writers']] is not accepted: a tuple of some of 'resid_post', 'writers'",
        "rows: 1000000000 is not accepted: a whole number from 1 to 4096",
        "rank: 100000 is not accepted: a whole number from 1 to 64",
    )


def test_what_is_no_name_and_no_path_is_told(llama: Any, d: steer.Direction) -> None:
    with steer.attach(llama, {"d": d}) as steering:
        uses: list[tuple[Any, str]] = [
            (lambda: steering.load(cast(Any, 1), d), "direction name 1 is not acceptable"),
            (lambda: steering.load("e", cast(Any, None)), "e: NoneType is not accepted: a Direction or a path"),
            (lambda: steering.load("e", "a\0b"), "the path of a direction file"),
            (lambda: steering.unload(cast(Any, None)), "direction name None is not acceptable"),
            (lambda: steering.unload(cast(Any, ["d"])), r"direction name \['d'\] is not acceptable"),
        ]
        for use, says in uses:
            with pytest.raises(DirectionError, match=says):
                use()
        assert list(steering.directions) == ["d"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_of_the_process_changes_nothing(llama: Any, dtype: torch.dtype) -> None:
    files = {"d": models.direction(llama, seed=1, plane=True), "e": models.direction(llama, seed=2, plane=True)}

    def steered() -> list[Tensor]:
        with steer.attach(llama, files) as steering:
            found = []
            for spec in (*(f"d:{mode}" for mode in MODES), "d,e", "d:clamp,e:add=0.1", "d:one_sided^0.3"):
                with steering(spec):
                    found.append(logits(llama))
        return found

    expected = steered()
    torch.set_default_dtype(dtype)
    try:
        got = steered()
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


# -- the read-out ----------------------------------------------------------------------------------------------------


def streams(model: Any, ids: Tensor, direction: steer.Direction | None, **more: Any) -> list[tuple[Tensor, Tensor]]:
    """For each layer the stream `[rows, positions, d_model]` before and after the ablation, by hooks of its own."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = []
    for layer, block in enumerate(Anatomy(model).blocks):

        def act(x: Tensor, layer: int = layer) -> Tensor:
            after = x if direction is None else ablated(x, direction.directions[layer, 0], 0.7)
            seen.append((x, after))
            return after

        handles.append(on_output(block, act))
    model(input_ids=ids, use_cache=False, **more)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_read_is_what_hooks_see(name: str, steered: bool) -> None:
    model = models.tiny(name)
    d, pair = models.direction(model, seed=1), models.direction(model, seed=2, k=2)
    expected = streams(model, IDS, d if steered else None)
    with steer.attach(model, {"d": d, "pair": pair}) as steering:
        plain = logits(model)
        with steering("d=0.7" if steered else "off"):
            with steering.read("d", "pair") as reading, steering.read("d", layers=[2]) as one:
                got = logits(model)
        assert torch.equal(got, plain) is not steered
    assert [(line.name, line.row) for line in reading.lines] == [("d", 0), ("pair", 0), ("pair", 1)]
    assert reading.layers == (0, 1, 2)
    assert reading.before.shape == reading.after.shape == (6, 10, 3, 3)
    assert reading.norms.shape == (6, 10, 3)
    assert reading.before.dtype == reading.norms.dtype == np.float32
    for layer, (before, after) in enumerate(expected):
        lines = torch.cat([d.directions[layer], pair.directions[layer]])
        np.testing.assert_allclose(reading.before[:, :, layer], before @ lines.T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(reading.after[:, :, layer], after @ lines.T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(reading.norms[:, :, layer], before.norm(dim=-1), rtol=1e-4)
    np.testing.assert_array_equal(one.before, reading.before[:, :, 2:, :1])


def test_blocks_that_see_some_positions_after_the_others_are_read_whole(d: steer.Direction) -> None:
    model, whole = models.tiny("llama"), models.tiny("llama")

    class Pieces(type(model.model.layers[0])):
        def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.shape[1] < 10:
                return super().__call__(x, *args, **kwargs)
            pieces = range(0, x.shape[1], 5)
            cos, sin = kwargs.pop("position_embeddings")
            kwargs.pop("attention_mask", None)
            return torch.cat(
                [
                    super(Pieces, self).__call__(
                        x[:, n : n + 5], *args, **kwargs, position_embeddings=(cos[:, n : n + 5], sin[:, n : n + 5])
                    )
                    for n in pieces
                ],
                1,
            )

    for block in model.model.layers:
        block.__class__ = Pieces
    with steer.attach(model, {"d": d}) as steering, steering.read("d") as pieces:
        logits(model)
    with steer.attach(whole, {"d": d}) as steering, steering.read("d") as reading:
        logits(whole)
    assert pieces.before.shape == reading.before.shape
    assert pieces.norms.shape == reading.norms.shape
    np.testing.assert_allclose(pieces.before[:, :5], reading.before[:, :5], rtol=1e-4, atol=1e-5)


def test_the_angle_in_the_plane_is_what_rotation_turns(llama: Any) -> None:
    """By the share that is asked for: at strength s what was α is (1 − s)·α."""
    made = models.direction(llama, seed=1, plane=True)
    v, u = made.directions[:, 0].clone(), cast(Tensor, made.axis).clone()
    v[1], u[1] = 0, 0
    made = replace(made, directions=v[:, None], axis=u)
    with steer.attach(llama, {"d": made}, rank=2) as steering:
        with steering("d:rotate=0.7"), steering.read("d", angle=True) as reading:
            logits(llama)
        with steering.read("d") as bare:
            logits(llama)
    assert reading.angles.shape == (2, 6, 10, 3, 1)
    before, after = reading.angles[..., 0]
    np.testing.assert_allclose(after[..., [0, 2]], 0.3 * before[..., [0, 2]], atol=1e-3)
    assert np.isnan(reading.angles[:, :, :, 1]).all(), "a layer that is not steered has no plane"
    x, _ = streams(llama, IDS, None)[0]
    np.testing.assert_allclose(before[..., 0], torch.atan2(x @ v[0], x @ u[0]).rad2deg(), atol=1e-3)
    assert reading.before.shape == bare.before.shape == (6, 10, 3, 1)
    with pytest.raises(ValueError, match="angles were not read"):
        _ = bare.angles


def test_generation_is_read_pass_by_pass(llama: Any, d: steer.Direction) -> None:
    mask = torch.ones_like(IDS)
    with steer.attach(llama, {"d": d}) as steering, steering("d=0.7"), steering.read("d") as reading:
        ids = llama.generate(IDS, attention_mask=mask, **GREEDY)
    assert [one.before.shape[1] for one in reading.passes] == [10, 1, 1, 1, 1]
    for layer, (before, after) in enumerate(streams(llama, ids[:, :-1], d)):
        line = d.directions[layer, 0]
        np.testing.assert_allclose(reading.before[:, :, layer, 0], before @ line, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(reading.after[:, :, layer, 0], after @ line, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_read_is_said(llama: Any, d: steer.Direction) -> None:
    written = models.direction(llama, shared=True, sites=("writers",))
    with steer.attach(llama, {"d": d, "w": written}, sites=("resid_post", "writers")) as steering:
        for names, layers, says in (
            ((), "all", "read: no direction"),
            (("x",), "all", "read: direction 'x' is not served"),
            (("w",), "all", "read: direction 'w' acts at the site 'writers'"),
            (("d",), [3], r"read\.layers: 3: this model has the layers 0 to 2"),
            (("d",), "last", r"read\.layers: 'last' is not accepted"),
            (("d",), 5, r"read\.layers: 5 is not accepted"),
            (("d",), None, r"read\.layers: null is not accepted"),
            (("d",), [1.0], r"read\.layers: \[1.0\] is not accepted"),
        ):
            with pytest.raises(SpecError, match=says), steering.read(*names, layers=cast(Any, layers)):
                raise AssertionError
        with steering.read("d") as reading:
            pass
        with pytest.raises(ValueError, match="nothing was read"):
            _ = reading.before
        with steering.read("d") as reading:
            logits(llama)
            logits(llama, IDS[:2])
            with pytest.raises(IndexError):
                logits(llama, IDS + 10_000)
        assert [len(one.norms) for one in reading.passes] == [6, 2]
        with pytest.raises(ValueError, match=r"the passes have \[2, 6\] rows"):
            _ = reading.before
        assert all(version.pins == 0 for version in steering._registry.names().values())


# -- the package -----------------------------------------------------------------------------------------------------


def test_the_names_of_the_package_and_its_help() -> None:
    assert dir(steer) == sorted(steer.__all__)
    signature = inspect.signature(steer.attach)
    assert list(signature.parameters) == ["model", "directions", "sites", "rows", "rank"]
    assert signature.return_annotation == "Attached"
    text = pydoc.render_doc(steer.attach)
    for word in (*signature.parameters, "detach", "with steering(", "steering.read", "Raises"):
        assert word in text
    assert (Path(steer.__file__).parent / "py.typed").exists()


def test_the_servers_hooks_are_as_before(llama: Any) -> None:
    steering = Steering(llama)
    assert not steering.attached
    assert not steering.watchers


def test_the_digest_of_a_file_is_that_of_its_bytes(llama: Any, d: steer.Direction, tmp_path: Path) -> None:
    """Also of a file that another version has written: a receipt names it, and is sent back."""
    ours, written = tmp_path / "ours.safetensors", tmp_path / "written.safetensors"
    d.save(ours)
    with safe_open(ours, "pt") as file:
        metadata = file.metadata()
    meta = json.loads(metadata["steer"])
    spaced = json.dumps(dict(reversed(meta.items())), indent=1)
    save_file(load_file(ours), written, metadata=metadata | {"steer": spaced})
    data = written.read_bytes()
    assert data != ours.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    with steer.attach(llama, {"d": written}) as steering:
        assert digest[:12] in repr(steering)
        plain = logits(llama)
        with steering({"direction": "d", "digest": digest}):
            assert all(changed(logits(llama), plain))
        steering.load("d", ours)
        assert hashlib.sha256(ours.read_bytes()).hexdigest()[:12] in repr(steering)


@pytest.mark.parametrize("specs", [[], (), ["off", "d"], ["d", None]])
def test_a_list_is_one_spec_and_not_one_for_each_row(llama: Any, d: steer.Direction, specs: Any) -> None:
    with steer.attach(llama, {"d": d}) as steering, pytest.raises(SpecError, match=r"steering\(\*specs\)"):
        steering(specs)


def test_a_receipt_and_any_list_of_directions_is_a_spec(llama: Any, d: steer.Direction) -> None:
    plain = logits(llama)
    with steer.attach(llama, {"d": d, "e": models.direction(llama, seed=2)}) as steering:
        digest = steering._registry.names()["d"].digest
        for spec in (
            [{"direction": "d", "strength": 0.5}],
            [{"direction": "d"}, {"direction": "e"}],
            ("d", {"direction": "e"}),
            json.loads(json.dumps([{"direction": "d", "digest": digest, "mode": "ablate", "strength": 1.5}])),
        ):
            with steering(spec):
                assert all(changed(logits(llama), plain))
        for wrong, says in (
            (["d", ["e"]], r"\['e'\] is not a direction"),
            ([["d"]], r"\['d'\] is not a direction"),
            ([{"d"}], "{'d'} is not a direction"),
            ([3], "3 is not a direction"),
        ):
            with pytest.raises(SpecError, match=says):
                steering(cast(Any, wrong))


def test_reading_does_not_begin_in_the_midst_of_another_threads_generate(llama: Any, d: steer.Direction) -> None:
    begun, go = threading.Event(), threading.Event()

    class Waiting(tf.LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            begun.set()
            assert go.wait(60)
            return scores

    with steer.attach(llama, {"d": d}) as steering:
        thread = threading.Thread(
            target=lambda: llama.generate(IDS, **GREEDY, logits_processor=tf.LogitsProcessorList([Waiting()]))
        )
        thread.start()
        try:
            assert begun.wait(60)
            with pytest.raises(RuntimeError, match="another thread is under way, and would be read"):
                steering.read("d").__enter__()
        finally:
            go.set()
            thread.join()
