"""The worker: vLLM's worker for this platform, with steering attached to the loaded model before anything is compiled.

`worker_cls="steer.vllm.worker.Worker"` selects it, and each worker process has an instance. The worker receives
directions as bytes by `collective_rpc`, and the resolved specs of requests in `SamplingParams.extra_args`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import repeat
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from steer._version import __version__
from steer.errors import DirectionError, NoRoom, SteerError, UnsupportedModel
from steer.runtime.token_index import PLAIN, TokenIndex, Tokens
from steer.spec import Spec
from steer.tokenization import Thinking
from steer.vllm import install, internals, settings
from steer.vllm.losses import SteeredRun, SteeredRuns, Step
from steer.vllm.readout import Asked, WorkerCapture
from steer.vllm.residents import Kept, Residents, RowsInUse
from steer.vllm.steering_module import code_digest

if TYPE_CHECKING:
    from steer.vllm.internals import types
    from steer.vllm.internals.base import Method

log = logging.getLogger("steer")
_NONE = np.zeros(0, np.int64)


class SteeringWorker:
    """The mixin that makes the platform's worker steer. Every method runs on the worker's main thread.

    A *step* is a pass that the engine has scheduled, and its requests come from the front end. A *call* is anything
    else that the engine asks of the worker. In a call vLLM may make plain requests of its own, which no client has
    sent, and may do anything to the model. So before the next step all tensors are checked once.
    """

    if TYPE_CHECKING:
        vllm_config: types.VllmConfig
        model_runner: types.GPUModelRunner
        model_config: types.ModelConfig
        device: torch.device

        def get_model(self) -> torch.nn.Module: ...

    def __init__(self, vllm_config: types.VllmConfig, *args: object, **kwargs: object) -> None:
        found = settings.read(vllm_config.additional_config)
        if found is None:
            raise UnsupportedModel(
                f"worker_cls {internals.WORKER} needs additional_config={{'{settings.KEY}': {{...}}}} ({{}} is enough)"
            )
        internals.check_version()
        internals.config.check_config(vllm_config, readout=bool(found.readout))
        self.steer_settings = found
        # vLLM hashes this value into the key of its compile cache. So this engine never takes a graph that was compiled
        # without hooks or with other code of ours, and the name of a folder makes no difference.
        # The dict is a new one, because in a single process the old one belongs to the caller.
        key = found.graph() | {"version": __version__, "code": code_digest()}
        vllm_config.additional_config = {**vllm_config.additional_config, settings.KEY: key}
        self._inside: Literal["", "step", "call"] = ""
        self._looked = False
        self._kept: Kept | None = None
        self._undo: Callable[[], None] | None = None
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]  # the platform's worker
        internals.worker.around_calls(self, self._call)

    def load_model(self, *args: object, **kwargs: object) -> None:
        if self._kept is not None:
            raise UnsupportedModel("the model was to be loaded a second time: steering needs a new engine for this")
        super().load_model(*args, **kwargs)
        own = self.steer_settings
        index = TokenIndex(own.rank, internals.config.max_tokens(self.vllm_config), self.device)
        self._installation = install.attach(self, own, index)
        self._index = index
        self._residents = Residents(self._installation.bank)
        self._running: dict[str, int] = {}  # steered requests, by their numbers in the index
        self._lost_runs = SteeredRuns()
        self._passed: Step | None = None  # the step that was enqueued last, until its outputs are asked for
        self._batch: tuple[list[str], NDArray[np.int32]] = [], np.zeros(0, np.int32)
        #: The tensors that the previous rank has handed on for the step that runs.
        self._from_before: types.IntermediateTensors | None = None
        self._met_front_end = False
        self._thinking: Thinking | None = None
        self._folder = ""  # the folder that the front ends share
        self._reads = self._installation.reads
        self._capture: WorkerCapture | None = None
        self._runner_kind = internals.worker.watch_batches(self.model_runner, self._on_batch)
        internals.worker.keep_seeds(self.model_runner)
        internals.worker.between_ranks(self, self._enter_rank, self._leave_rank)
        self._kept = Kept(self.get_model())
        folded, points = self._installation.folded, len(self._installation.steering_modules)
        config = self.vllm_config.additional_config
        config[settings.KEY] = {**config[settings.KEY], "folded": folded}
        log.info(
            "steering attached: %s runner, layers %s, %d hook points in norms and %d as hooks, %.1f MiB on the device",
            self._runner_kind,
            tuple(self._installation.blocks),
            len(folded),
            points - len(folded),
            self._kept.nbytes / 2**20,
        )

    def _call(self, method: Method, *args: object, **kwargs: object) -> object:
        """Run `method` as a call; inside another call or a step it runs as a part of that."""
        if self._inside:
            return method(*args, **kwargs)
        if self._kept is not None:
            self._rest()
        self._inside, self._looked = "call", False
        try:
            return method(*args, **kwargs)
        finally:
            self._inside = ""

    def _rest(self) -> None:
        """Make every token plain until the next step: what runs until then belongs to no request."""
        self._index.fill(_NONE, _NONE)

    def execute_model(self, scheduler_output: types.SchedulerOutput, *args: object, **kwargs: object) -> object:
        if self._inside:  # a warm-up
            return super().execute_model(scheduler_output, *args, **kwargs)
        self._inside = "step"
        try:
            return self._step(scheduler_output, *args, **kwargs)
        finally:
            self._inside = ""

    def execute_dummy_batch(self, *args: object, **kwargs: object) -> object:
        """Run a pass without requests, so that other ranks can go on."""
        self._rest()
        return super().execute_dummy_batch(*args, **kwargs)

    def _step(self, scheduler_output: types.SchedulerOutput, *args: object, **kwargs: object) -> object:
        if not self._looked:
            self._look()
        # If a request was aborted and a new one has the same id, both lists of one step may name it: ends come first.
        for request in scheduler_output.finished_req_ids:
            if number := self._running.pop(request, None):
                self._index.decisions.give(self._index.leave(number))
            self._residents.end(request)
            self._lost_runs.end(request)
            if self._reads is not None:
                self._reads.end(request)
        for new in scheduler_output.scheduled_new_reqs:
            self._meet(new)
        watchers = [w for w in (self._capture, self._reads) if w is not None and w.busy]
        if not scheduler_output.total_num_scheduled_tokens:
            self._rest()  # vLLM may still run a pass because other ranks need it
        self._batch = [], np.zeros(0, np.int32)
        out = super().execute_model(scheduler_output, *args, **kwargs)
        losses = self._index.losses() if self._batch[0] else None
        self._passed = None if losses is None else Step(losses, *self._batch, scheduler_output)
        for watcher in watchers:
            watcher.end_step()
        return out if out is None else self._with_losses(out)

    def sample_tokens(self, *args: object, **kwargs: object) -> object:
        """The output of a step whose `execute_model` returned None."""
        return self._with_losses(super().sample_tokens(*args, **kwargs))

    def _with_losses(self, out: object) -> object:
        """vLLM's output of the step. When it is read, it also reports the requests that the step has lost."""
        passed, self._passed = self._passed, None
        return internals.worker.on_output(out, lambda output: self._lost_runs.annotate(output, passed))

    def _enter_rank(self, tensors: types.IntermediateTensors | None) -> None:
        self._from_before = tensors

    def _leave_rank(self, tensors: dict[str, torch.Tensor]) -> None:
        """Send the losses of the ranks so far to the next rank, together with the stream: the last rank gives the
        outputs."""
        tensors.pop(internals.worker.FOUND, None)  # from a captured graph they may be the tensors of an earlier step
        if self._index.active:
            tensors[internals.worker.FOUND] = self._index.found()

    def _look(self) -> None:
        """Check once after calls that all tensors are where graphs read them, with the right content, and put back
        those that are not. Waits for the device.

        Raises UnsupportedModel if a tensor cannot be put back.
        """
        assert self._kept is not None, "no step comes before the model is loaded"
        lost = [*self._kept.put_back(self.get_model()), *self._residents.put_back()]
        self._index.reset()
        self._residents.bank.renumber()
        if (combinations := self._residents.bank.combinations) is not None:
            combinations.renew()
        if self._reads is not None:
            self._reads.at.zero_()
            self._reads.rows.zero_()
        if lost:
            log.warning("steering was put back after the model had been changed: %s", ", ".join(lost))
        self._looked = True

    def _meet(self, new: types.NewRequestData) -> None:
        """Take in a request at its first step here, or when it returns from preemption (V2 sends it as a new one)."""
        if not self._met_front_end:
            raise UnsupportedModel(
                "a request did not pass Steer's front end: the plugin 'steer' is not loaded in the process "
                "that makes requests (is it missing in VLLM_PLUGINS?)"
            )
        self._residents.end(new.req_id)
        if self._capture is not None:
            self._capture.meet(new.req_id, new.sampling_params)
        digests, axes = settings.read_by(new.sampling_params)
        if self._reads is not None and digests:
            rows = self._residents.rows_of(new.req_id, digests, axes)
            self._reads.meet(new.req_id, rows, internals.worker.new_prompt_length(new))
        text = settings.receipt_of(new.sampling_params)
        if text is None:
            return
        spec, length, prompt = Spec.of(text), internals.worker.new_prompt_length(new), new.prompt_token_ids or ()
        asked = settings.prompt_of(new.sampling_params, length)
        steer = self._residents.steer(new.req_id, spec, asked, spec.phase(self._thinking, prompt[:asked]))
        if new.req_id in self._running:  # it keeps its decisions
            return
        run = SteeredRun(internals.worker.adapter_of(new) + spec.key(asked), internals.worker.prompt_of(new), length)
        self._lost_runs.meet(new.req_id, run)
        self._running[new.req_id] = self._index.enter(self._index.decisions.take(steer))

    def _on_batch(
        self, requests: list[str], lengths: NDArray[np.int32], starts: NDArray[np.int32], tokens: Tokens
    ) -> None:
        if self._inside == "call":
            self._rest()
            return
        numbers = _NONE
        if running := self._running:
            numbers = np.fromiter(map(running.get, requests, repeat(PLAIN)), np.int64, len(requests))
        steered = self._index.fill(numbers, lengths, starts, tokens)
        self._batch = (list(requests), lengths.copy()) if steered else ([], lengths)
        before, self._from_before = self._from_before, None
        lost = None if before is None else before.tensors.pop(internals.worker.FOUND, None)
        if steered and lost is not None:
            self._index.go_on(lost)
        for watcher in (self._capture, self._reads):
            if watcher is not None and watcher.busy:
                watcher.begin_step(requests, lengths, starts)

    # -- called by `collective_rpc`; failures are answers, so that the failure of one worker cannot end the engine ----

    def steer_hello(self, front_end: str, folder: str, thinking: list[int] | None = None) -> dict[str, object]:
        """Meet a front end.

        Args:
            front_end: its name, `INDEX:LIFE`.
            folder: the folder that it names for the front ends to share; empty for none. The first name counts.
            thinking: the tokens that begin and end the model's thinking, and then its special tokens.

        Returns:
            The kind of the runner, the layers of this worker, the digest of its code, and the shared folder.
        """
        self._met_front_end = True
        if thinking:
            begin, end, *special = thinking
            self._thinking = Thinking(begin, end, frozenset(special))
        self._residents.meet(front_end)
        self._folder = self._folder or folder
        layers = tuple(self._installation.blocks)
        return {"runner": self._runner_kind, "layers": layers, "code": code_digest(), "folder": self._folder}

    def steer_load(self, data: bytes, digest: str, front_end: str) -> dict[str, str]:
        kinds = {RowsInUse: "in_use", NoRoom: "no_room", DirectionError: "refused", SteerError: "error"}
        try:
            return {"digest": self._residents.load(data, digest, front_end)}
        except SteerError as error:
            return {next(key for kind, key in kinds.items() if isinstance(error, kind)): str(error)}

    def steer_unload(self, digest: str, front_end: str) -> None:
        self._residents.retire(digest, front_end)

    def steer_streams(self) -> list[tuple[str, int, bytes]]:
        """(site, layer, vector as float32 bytes) of each hook point in `Installation.streams`."""
        return [(point.site, point.layer, x.numpy().tobytes()) for point, x in self._installation.streams.items()]

    def steer_eager(self, on: bool) -> dict[str, str]:
        """Have the model's own Python run in place of compiled and captured graphs, until a call with False."""
        try:
            if on and self._undo is None:
                self._undo = internals.worker.run_eager(self)
            elif not on and self._undo is not None:
                self._undo()
                self._undo = None
        except SteerError as error:
            return {"error": str(error)}
        return {}

    def steer_capture(self, asked: list[Asked], last_layer: int) -> dict[str, str]:
        """Start to read what is asked of each prompt, at the blocks up to `last_layer`."""
        if int(self.vllm_config.compilation_config.mode or 0) or self.vllm_config.cache_config.enable_prefix_caching:
            return {"error": "measuring needs an engine with enforce_eager and without prefix caching"}
        self.steer_captured()
        blocks = {layer: block for layer, block in self._installation.blocks.items() if layer <= last_layer}
        d_model = self._installation.bank.d_model
        self._capture = WorkerCapture(blocks, self._installation.form, asked, d_model, self.device)
        return {}

    def steer_captured(self) -> dict[str, object] | None:
        """End what `steer_capture` began. Returns what was read since then: (layer, picked, own) with float64 bytes for
        each layer, and the number of tokens seen of each prompt; None if nothing was begun."""
        if (capture := self._capture) is None:
            return None
        capture.close()
        self._capture = None
        layers = [
            (layer, *(t[layer].cpu().numpy().tobytes() for t in (capture.picked, capture.own)))
            for layer in capture.picked
        ]
        return {"layers": layers, "seen": capture.seen}

    def steer_readings(self, request_id: str) -> list[tuple[int, bytes]] | None:
        """What was read for a request that has ended, by layer; None if there is nothing, or nothing any more."""
        return self._reads.take(request_id) if self._reads is not None else None


def __getattr__(name: str) -> object:
    """Make `Worker` when it is asked for: its base class depends on the platform of the process where it will run."""
    if name != "Worker":
        raise AttributeError(name)
    made = type("Worker", (SteeringWorker, internals.worker.platform_worker()), {"__module__": __name__})
    globals()["Worker"] = made
    return made
