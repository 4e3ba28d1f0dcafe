"""One compiled engine under all that could mix requests up: small cache, chunks, preemption, swaps, bad input."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.errors import DirectionError, NoRoom, UnsupportedModel
from steer.spec import PHASES, parse
from steer.tokenization import Thinking
from tests import models
from tests.vllm.conftest import IN_PROCESS
from tests.vllm.engines import PROMPTS, SPECS, Home, Reference, check_told, generate, parameters, think

BLOCK = 32
LONG = "the same long beginning of several prompts, more than one block of the cache: " * 2
ROWS = 5  # of which `refusal` takes two: it has a plane, and the engine has rank 2


def compiled() -> tuple[int, ...]:
    """How many graphs this process has traced so far: by Dynamo, and by vLLM's own backend where it is in use."""
    from torch._dynamo.utils import counters
    from vllm.compilation.counter import compilation_counter

    return counters["stats"]["unique_graphs"], compilation_counter.num_graphs_seen


@dataclass(frozen=True)
class Running:
    home: Home
    reference: Reference
    llm: Any
    compiled: tuple[int, ...]

    @property
    def frontend(self) -> Any:
        from steer.vllm import frontend

        return frontend.of(self.llm)

    @property
    def pins(self) -> int:
        return sum(version.pins for version in self.frontend.registry.names().values())

    @property
    def worker(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker

    def check_mixed(self, *more: str) -> None:
        jobs = [(prompt, spec) for spec in ("off", "refusal", "verbosity:add=0.5", *more) for prompt in PROMPTS]
        for (_, spec), output in zip(jobs, generate(self.llm, jobs, max_tokens=4), strict=True):
            self.reference.check(output, spec)

    @property
    def rows(self) -> int:
        return int(self.worker._residents.bank.rows_in_use)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, in_process: Callable[[Any], None]) -> Iterator[Running]:
    home = Home.make("llama", tmp_path_factory.mktemp("engine"))
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # so that it is traced here, whatever ran before
    llm = home.start(
        **IN_PROCESS,
        steer={"rows": ROWS},
        block_size=BLOCK,
        num_gpu_blocks_override=16,
        max_num_batched_tokens=48,
        max_num_seqs=16,
        disable_log_stats=False,
    )
    patch.undo()
    # vLLM compiles helpers when the first log-probabilities are asked for, and when its own Python runs one token
    generate(llm, [(PROMPTS[0], "off")])
    llm.collective_rpc("steer_eager", args=(True,))
    generate(llm, [(PROMPTS[0], "off")])
    llm.collective_rpc("steer_eager", args=(False,))
    yield Running(home, Reference(home), llm, compiled())
    in_process(llm)


def _metric(llm: Any, name: str) -> float:
    return float(sum(metric.value for metric in llm.get_metrics() if metric.name == name))


def test_it_was_compiled_without_a_graph_break(running: Running) -> None:
    from torch._dynamo.utils import counters

    mode = running.llm.llm_engine.vllm_config.compilation_config.mode
    assert int(mode) > 0, f"compilation mode {mode}"
    assert running.compiled[0] > 0
    assert not counters["graph_break"]


def test_the_operation_is_in_the_norms_and_the_compile_cache_knows_which(running: Running) -> None:
    layers = tuple(range(models.LAYERS))
    assert running.worker._installation.folded == layers
    assert tuple(running.worker.vllm_config.additional_config["steer"]["folded"]) == layers
    assert [point.layer for point, module in running.worker._installation.steering_modules] == [-1, *layers]


def replays(runner: Any) -> bool:
    """Would it replay what was captured?"""
    if hasattr(runner, "cudagraph_dispatcher"):
        return bool(runner.cudagraph_dispatcher.keys_initialized)
    return bool(runner.cudagraph_manager._graphs_captured)


def test_the_models_own_code_runs_only_while_the_start_asks_for_it(running: Running) -> None:
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    assert not any("witness" in name for name, _ in running.worker.get_model().named_buffers())
    own = [m for m in running.worker.get_model().modules() if isinstance(m, TorchCompileWithNoGuardsWrapper)]
    before = replays(running.worker.model_runner)
    assert own
    assert not any(module.do_not_compile for module in own), "the start has put it back"
    passes: list[int] = []
    handle = running.worker._installation.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        running.check_mixed()
        assert not passes, "no graph has a hook that came later"
        for _ in range(2):  # it may be asked for twice
            assert running.llm.collective_rpc("steer_eager", args=(True,)) == [{}]
        assert not replays(running.worker.model_runner)
        running.check_mixed()
        assert passes
        for _ in range(2):
            assert running.llm.collective_rpc("steer_eager", args=(False,)) == [{}]
        assert replays(running.worker.model_runner) == before
        passes.clear()
        running.check_mixed()
        assert not passes
    finally:
        handle.remove()
        running.llm.collective_rpc("steer_eager", args=(False,))


def test_nothing_of_the_proof_is_left(running: Running) -> None:
    registry = running.frontend.registry
    assert set(registry.names()) >= {"refusal", "verbosity"}
    assert not any(name.startswith("probe-") for name in registry.names())
    assert running.pins == 0
    assert not running.frontend.held
    assert not running.llm.llm_engine.has_unfinished_requests()


def test_every_mixed_request_gets_what_it_gets_alone(running: Running) -> None:
    choose = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    jobs, phases = [], [f"refusal@{phase}=1.5,verbosity:add@{phase}=0.5" for phase in PHASES]
    said = generate(running.llm, [(words[0], "off")])[0].outputs[0].token_ids
    think(running.llm, running.reference, Thinking(said[1], said[4], frozenset()))
    for _ in range(500):
        beginning = choose.choice(["", "", LONG[: choose.randrange(16, len(LONG))]])
        jobs.append(
            (beginning + " ".join(choose.choices(words, k=choose.randrange(1, 8))), choose.choice((*SPECS, *phases)))
        )
    before = _metric(running.llm, "vllm:num_preemptions")
    outputs = generate(running.llm, jobs, max_tokens=choose.randrange(8, 24))
    assert _metric(running.llm, "vllm:num_preemptions") > before, "the cache was meant to be too small"
    for (_, spec), output in zip(jobs, outputs, strict=True):
        running.reference.check(output, spec)
    assert running.pins == 0
    generate(running.llm, [(PROMPTS[0], "off")])  # the workers hear of an end at the next step
    assert not running.worker._running


def test_each_answer_is_known_to_be_steered_or_not(running: Running) -> None:
    """With prompts in chunks and preemption; each of two to a prompt, and of some that are ended early."""
    specs = [*SPECS[-2:], "off", "refusal@answer", "refusal@not-first", *(f"refusal@{phase}" for phase in PHASES)]
    words, before = LONG.split(), _metric(running.llm, "vllm:num_preemptions")
    said = generate(running.llm, [(words[0], "off")])[0].outputs[0].token_ids
    jobs = [(" ".join(words[n % 7 : n % 7 + n]), spec) for n in range(1, 9) for spec in specs]
    for thinking in (Thinking(said[1], said[4], frozenset()), Thinking(126, 127, frozenset())):
        think(running.llm, running.reference, thinking)
        for more in ({}, {"n": 2, "temperature": 1}, {"max_tokens": 1}, {"stop_token_ids": [said[2]]}):
            assert check_told(running.llm, running.reference, jobs, **more) == {None, False, True}
    assert _metric(running.llm, "vllm:num_preemptions") > before, "the cache was meant to be too small"


@pytest.mark.parametrize("spec", SPECS[1:])
def test_a_steered_request_takes_no_block_of_a_plain_one_or_of_another_spec(running: Running, spec: str) -> None:
    running.llm.reset_prefix_cache()
    for asked in ("off", spec, spec, "refusal=0.25", "off", spec):
        [output] = generate(running.llm, [(LONG, asked)])
        running.reference.check(output, asked)
    again = [generate(running.llm, [(LONG, asked)])[0].num_cached_tokens for asked in ("off", spec)]
    assert min(again) >= BLOCK, "each finds its own blocks"


def test_plain_requests_find_each_others_blocks_however_they_say_it(running: Running) -> None:
    running.llm.reset_prefix_cache()
    generate(running.llm, [(LONG, "off")])
    [silent] = running.llm.generate([LONG], [parameters(None)], use_tqdm=False)
    [zero] = generate(running.llm, [(LONG, "refusal=0")])
    assert silent.num_cached_tokens >= BLOCK
    assert zero.num_cached_tokens >= BLOCK


def test_what_is_plain_of_a_steered_prompt_is_found_where_plain_requests_left_it(running: Running) -> None:
    """And the other way round; what an answer has left under steering is found by no turn in which it is plain."""
    spec, length = "refusal@answer", len(running.llm.get_tokenizer()(LONG).input_ids)
    whole = (length - 1) // BLOCK * BLOCK
    assert whole >= 3 * BLOCK
    pairs = [("off", spec), (spec, "off"), (spec, "verbosity@answer"), (spec, SPECS[-2]), (SPECS[-1], "off")]
    for first, second in pairs:
        running.llm.reset_prefix_cache()
        generate(running.llm, [(LONG, first)])
        [output] = generate(running.llm, [(LONG, second)])
        assert output.num_cached_tokens == whole
        running.reference.check(output, second)
    running.llm.reset_prefix_cache()
    [turn] = generate(running.llm, [(LONG, spec)], max_tokens=3 * BLOCK)
    ids = [*turn.prompt_token_ids, *turn.outputs[0].token_ids]
    for asked in ("off", spec, "refusal@prompt"):
        [output] = running.llm.generate([{"prompt_token_ids": ids}], [parameters(asked)], use_tqdm=False)
        running.reference.check(output, asked)
        assert output.num_cached_tokens <= whole or asked != "off"
    salted = {"prompt": LONG, "cache_salt": "mine"}
    for cached in (0, whole):
        [output] = running.llm.generate([salted], [parameters(spec)], use_tqdm=False)
        assert output.num_cached_tokens == cached, "one's own salt parts the first block too"


def test_the_users_own_salt_still_parts_requests(running: Running) -> None:
    running.llm.reset_prefix_cache()
    generate(running.llm, [(LONG, "refusal")])
    prompt = {"prompt": LONG, "cache_salt": "mine"}
    [other] = running.llm.generate([prompt], [parameters("refusal")], use_tqdm=False)
    [again] = running.llm.generate([prompt], [parameters("refusal")], use_tqdm=False)
    assert other.num_cached_tokens == 0
    assert again.num_cached_tokens >= BLOCK


@pytest.mark.parametrize("spec", ["off", "refusal"])
def test_no_request_can_leave_blocks_for_another_spec(running: Running, spec: str) -> None:
    from steer.vllm.frontend import SALT

    prompt = {"prompt": LONG, "cache_salt": f"{SALT}anything"}
    with pytest.raises(ValueError, match="must not contain"):
        running.llm.generate([prompt], [parameters(spec)], use_tqdm=False)
    assert running.pins == 0


def test_a_stream_that_overflows_ends_its_request_alone_and_leaves_no_block(running: Running) -> None:
    """Also where another with the same beginning and the same steering finds its blocks before its end is known, and
    where a later one looks for them."""
    running.llm.reset_prefix_cache()
    registry, model = running.frontend.registry, running.home.model
    wild = models.direction(model, seed=8, shared=True)
    registry.put("wild", replace(wild, weights=torch.full_like(wild.weights, 1e12)).to_bytes(), store=False)
    good = [(prompt, spec) for prompt in (*PROMPTS, LONG) for spec in ("off", "refusal", "verbosity:add=0.5")]
    before = generate(running.llm, good, max_tokens=4)
    for _ in range(3):
        jobs = [*good, (LONG, "wild=10"), (LONG + "and more", "wild=10"), (PROMPTS[0], "wild=-10")]
        *outputs, one, two, three = generate(running.llm, jobs, max_tokens=4)
        for (_, spec), output, alone in zip(good, outputs, before, strict=True):
            running.reference.check(output, spec)
            assert output.outputs[0].token_ids == alone.outputs[0].token_ids
        for failed in (one, two, three):
            assert failed.outputs[0].finish_reason == "error"
            assert "out of the range" in failed.outputs[0].stop_reason
            assert not failed.outputs[0].token_ids
    assert running.pins == 0
    [fine] = generate(running.llm, [(LONG, "wild=1e-30")], max_tokens=4)
    assert fine.outputs[0].finish_reason == "length", "at another strength nothing is lost"
    registry.delete("wild")


def test_a_swapped_direction_hits_no_block_of_the_old_one(running: Running) -> None:
    registry = running.frontend.registry
    new = models.direction(running.home.model, seed=7).to_bytes()
    registry.put("swapped", models.direction(running.home.model, seed=6).to_bytes(), store=False)
    generate(running.llm, [(LONG, "swapped")])
    registry.put("swapped", new, store=False)
    running.reference.registry.put("swapped", new, store=False)
    try:
        [output] = generate(running.llm, [(LONG, "swapped")])
        assert output.num_cached_tokens == 0
        running.reference.check(output, "swapped")
    finally:
        registry.delete("swapped")
        running.reference.registry.delete("swapped")


def test_many_swaps_reuse_rows(running: Running) -> None:
    registry = running.frontend.registry
    for seed in range(20, 20 + 3 * ROWS):
        data = models.direction(running.home.model, seed=seed).to_bytes()
        registry.put("swapped", data, store=False)
        running.reference.registry.put("swapped", data, store=False)
        jobs = [(PROMPTS[0], "swapped"), (PROMPTS[1], "refusal"), (PROMPTS[1], "off")]
        for (_, spec), output in zip(jobs, generate(running.llm, jobs, max_tokens=4), strict=True):
            running.reference.check(output, spec)
    registry.delete("swapped")
    running.reference.registry.delete("swapped")


def test_a_running_request_keeps_its_version_through_a_swap(running: Running) -> None:
    registry, engine = running.frontend.registry, running.llm.llm_engine
    old, new = (models.direction(running.home.model, seed=seed).to_bytes() for seed in (41, 42))
    registry.put("swapped", old, store=False)
    running.reference.registry.put("swapped", old, store=False)
    engine.add_request("old", PROMPTS[0], parameters("swapped"))
    engine.step()
    registry.put("swapped", new, store=False)
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += [output for output in engine.step() if output.finished]
    running.reference.check(outputs[0], "swapped")
    assert running.pins == 0
    registry.delete("swapped")
    running.reference.registry.delete("swapped")


def test_weights_that_are_loaded_anew_are_steered(running: Running) -> None:
    running.check_mixed()
    running.llm.collective_rpc("reload_weights")
    running.llm.reset_prefix_cache()
    running.check_mixed()


def test_what_a_call_does_to_the_seats_is_put_back_before_the_next_step(running: Running) -> None:
    """Buffers deleted, steering modules replaced, rows and index overwritten: as layers' reloading in some versions
    does, and what a memory pool that is given back may leave."""
    from steer.vllm.steering_module import SteeringModule

    running.check_mixed()

    def ruin(model: Any) -> None:
        for steering_module in [module for module in model.modules() if isinstance(module, SteeringModule)]:
            for tensor in steering_module.buffers():
                tensor.fill_(1)
            for name in [name for name, _ in steering_module.named_buffers()]:
                delattr(steering_module, name)
        for name, module in list(model.named_modules()):
            if isinstance(module, SteeringModule) and ".1." in name:
                parent, _, own = name.rpartition(".")
                delattr(model.get_submodule(parent), own)

    running.worker.apply_model(ruin)
    running.llm.reset_prefix_cache()
    running.check_mixed("refusal@1")


def test_buffers_put_back_from_before_a_swap_are_not_believed(running: Running) -> None:
    """Sleep of level 2 keeps a copy of all buffers and writes it back: what was loaded in between must outlive it."""
    saved: dict[str, Any] = {}
    running.worker.apply_model(lambda model: saved.update({n: b.clone() for n, b in model.named_buffers()}))
    data = models.direction(running.home.model, seed=91).to_bytes()
    for registry in (running.frontend.registry, running.reference.registry):
        registry.put("swapped", data, store=False)

    def restore(model: Any) -> None:
        for name, buffer in model.named_buffers():
            buffer.copy_(saved[name])

    running.worker.apply_model(restore)
    running.check_mixed("swapped")
    for registry in (running.frontend.registry, running.reference.registry):
        registry.delete("swapped")


def test_a_pass_for_other_ranks_is_plain_and_disturbs_nobody(running: Running) -> None:
    engine = running.llm.llm_engine
    engine.add_request("some", PROMPTS[0], parameters("refusal"))
    engine.step()
    assert running.worker._index.packed.any()
    running.worker.execute_dummy_batch()
    assert not running.worker._index.packed.any()
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += [output for output in engine.step() if output.finished]
    running.reference.check(outputs[0], "refusal")


def test_a_model_cannot_be_loaded_a_second_time(running: Running) -> None:
    with pytest.raises(UnsupportedModel, match="a second time"):
        running.worker.load_model()


def test_a_full_table_refuses_and_goes_on(running: Running) -> None:
    registry = running.frontend.registry
    registry.patience = 0.1
    names = [f"filler{i}" for i in range(ROWS)]
    datas = [models.direction(running.home.model, seed=60 + seed).to_bytes() for seed in range(ROWS)]
    free = ROWS - running.frontend.registry.rows
    for name, data in zip(names[:free], datas, strict=False):
        registry.put(name, data, store=False)
    with pytest.raises(NoRoom, match="free bank rows"):
        registry.put(names[free], datas[free], store=False)
    for name in names[:free]:
        registry.delete(name)
    for (_, spec), output in zip(jobs := [(p, "refusal") for p in PROMPTS], generate(running.llm, jobs), strict=True):
        running.reference.check(output, spec)


def test_bad_files_reach_no_worker(running: Running) -> None:
    rows = running.rows
    other = models.direction(models.tiny("llama"), seed=1)  # another d_model
    with pytest.raises(DirectionError, match="made for d_model 64, this model has 128"):
        running.frontend.registry.put("bad", other.to_bytes(), store=False)
    with pytest.raises(DirectionError, match="not a safetensors file"):
        running.frontend.registry.put("bad", b"junk", store=False)
    running.frontend.registry.failures.clear()
    assert running.rows == rows


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nobody", "direction 'nobody' is not served; served: refusal, verbosity"),
        ("refusal=11", "strength"),
        ("refusal:sideways", "is not a mode"),
        ("refusal,verbosity,refusal:affine", "needs 3 direction rows"),
        (7, "not understood"),
        ("ticket:0123", "is not a mode"),
    ],
)
def test_bad_requests_are_refused_and_harm_no_other(running: Running, spec: Any, message: str) -> None:
    engine = running.llm.llm_engine
    engine.add_request("good", PROMPTS[0], parameters("refusal"))
    with pytest.raises(ValueError, match=message):
        engine.add_request("bad", PROMPTS[0], parameters(spec))
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += [output for output in engine.step() if output.finished]
    [output] = outputs
    running.reference.check(output, "refusal")
    assert running.pins == 0


def test_requests_cannot_write_what_the_front_end_writes(running: Running) -> None:
    from vllm import SamplingParams

    with pytest.raises(ValueError, match="not for requests to set"):
        running.llm.generate(["x"], [SamplingParams(extra_args={"steer.resolved": "[]"})], use_tqdm=False)


def test_an_aborted_request_lets_its_pins_go(running: Running) -> None:
    engine = running.llm.llm_engine
    name = engine.add_request("gone", PROMPTS[0], parameters("refusal"))
    engine.step()
    assert running.pins == 1
    engine.abort_request([name], internal=True)
    assert running.pins == 0
    while engine.has_unfinished_requests():
        engine.step()
    generate(running.llm, [(PROMPTS[0], "off")])
    assert not running.worker._running


@pytest.mark.parametrize("fails", ["output processor", "engine"])
@pytest.mark.parametrize("n", [1, 2])
def test_what_fails_on_its_way_in_holds_nothing(
    running: Running, monkeypatch: pytest.MonkeyPatch, fails: str, n: int
) -> None:
    """At its last sample, when others of the request are in already."""
    from vllm.v1.engine.output_processor import RequestState

    engine = running.llm.llm_engine
    owner, name = (
        (RequestState, "from_new_request") if fails == "output processor" else (engine.engine_core, "add_request")
    )
    real, left = getattr(owner, name), [n]

    def failing(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(MemoryError):
        engine.add_request("failing", PROMPTS[0], parameters("refusal", n=n, temperature=1.0, seed=1))
    assert left == [0]
    monkeypatch.undo()
    assert (running.pins, running.frontend.held) == (0, {})
    assert not engine.has_unfinished_requests()
    generate(running.llm, [(PROMPTS[0], "off")])
    assert not running.worker._running


def test_a_servers_engine_takes_nothing_that_was_not_let_pass(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer.vllm.frontend import Passage, passage

    monkeypatch.setattr(running.frontend, "serves", True)
    for spec in (None, "off", "refusal", "ticket:00"):
        with pytest.raises(ValueError, match="this route"):
            running.llm.generate([PROMPTS[0]], [parameters(spec)], use_tqdm=False)
    token = passage.set(Passage(plain=True))
    try:
        [plain] = running.llm.generate([PROMPTS[0]], [parameters(None)], use_tqdm=False)
    finally:
        passage.reset(token)
    running.reference.check(plain, "off")
    assert running.pins == 0


def test_samples_of_one_request_are_all_steered(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    fill, steered = running.worker._index.fill, list[int]()

    def filling(*step: Any) -> int:
        steered.append(fill(*step))
        return steered[-1]

    monkeypatch.setattr(running.worker._index, "fill", filling)
    [output] = running.llm.generate([PROMPTS[0]], [parameters("refusal", n=3, temperature=1.0, seed=1)], use_tqdm=False)
    assert len(output.outputs) == 3
    assert running.pins == 0
    assert sum(steered) >= 3 * 11


def test_a_seed_gives_the_same_answer_whether_its_prompt_comes_in_pieces_or_not(running: Running) -> None:
    """vLLM takes a draw back that it makes at the end of a piece; on a CPU the request that had a seed ended the
    engine. The second time all but the last piece is found in the prefix cache."""
    prompt = [5 + i % 40 for i in range(100)]
    said, cached = [], []
    for _ in range(2):
        asked = parameters("refusal", temperature=1.0, seed=1)
        [output] = running.llm.generate([{"prompt_token_ids": prompt}], [asked], use_tqdm=False)
        said.append(output.outputs[0].token_ids)
        cached.append(output.num_cached_tokens)
    assert said[0] == said[1]
    assert cached[0] < 100 - 48 < cached[1]


def test_the_callers_parameters_are_left_alone(running: Running) -> None:
    given = parameters("refusal")
    running.llm.generate([PROMPTS[0]], [given], use_tqdm=False)
    assert given.extra_args == {"steer": "refusal"}


def test_the_default_of_the_engine_can_be_switched_off(running: Running) -> None:
    frontend = running.frontend
    frontend.default = parse("refusal=0.5")
    try:
        [silent] = running.llm.generate([PROMPTS[0]], [parameters(None)], use_tqdm=False)
        [off] = generate(running.llm, [(PROMPTS[0], "off")])
    finally:
        frontend.default = ()
    running.reference.check(silent, "refusal=0.5")
    running.reference.check(off, "off")


def test_the_compile_cache_knows_steering(running: Running, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    def key(**more: Any) -> str:
        args = EngineArgs(model=str(running.home.folder), dtype="float32", max_model_len=64, **more)
        return str(args.create_engine_config().compute_hash())

    worker = running.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    seen = worker.vllm_config.additional_config["steer"]
    assert set(seen) == {"sites", "rows", "rank", "readout", "version", "code", "folded"}
    assert key() != key(additional_config={"steer": seen})
    assert key(additional_config={"steer": seen}) != key(additional_config={"steer": seen | {"code": "other"}})


def test_blocks_that_vllm_offloads_itself_keep_their_hashes(running: Running) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from steer.vllm import internals

    def check(**more: Any) -> None:
        args = EngineArgs(model=str(running.home.folder), dtype="float32", max_model_len=64, **more)
        internals.config.check_config(args.create_engine_config(), readout=False)

    check(kv_offloading_size=1)
    with pytest.raises(UnsupportedModel, match="hands blocks between instances"):
        check(kv_transfer_config={"kv_connector": "NixlConnector", "kv_role": "kv_both"})


def test_no_mix_no_strength_and_no_swap_has_compiled_anything(running: Running) -> None:
    """Last in this file, behind all of them; and once more here, where it stands alone."""
    registry = running.frontend.registry
    for seed in (51, 52):
        data = models.direction(running.home.model, seed=seed).to_bytes()
        for either in (registry, running.reference.registry):
            either.put("swapped", data, store=False)
        for strength in (1.0, 0.37, -2.5):
            jobs = [(PROMPTS[0], f"swapped={strength}"), (PROMPTS[1], "off"), (PROMPTS[1], "refusal:one_sided,swapped")]
            for (_, spec), output in zip(jobs, generate(running.llm, jobs, max_tokens=3), strict=True):
                running.reference.check(output, spec)
    for either in (registry, running.reference.registry):
        either.delete("swapped")
    assert compiled() == running.compiled
