"""A source of activations (see `steer.lab.source`) on a vLLM engine: what is measured is what serves, its quantised
weights and its kernels, on all of its ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.chat import Chat
from steer.errors import EngineFailed, InvalidInput
from steer.lab.activations import Activations, Reading
from steer.lab.measurement import ModelFacts
from steer.lab.prompts import Encoded, Prompt, encode_all
from steer.vllm import capture, internals
from steer.vllm.settings import KEY


def start(model: str, options: Sequence[str] = (), *, sites: Sequence[str] = ("resid_post",), rank: int = 8) -> Any:
    """An `LLM` for measuring: eager, since hooks in Python read the stream, and without prefix cache, since a cached
    token never comes by. `options` are those of `vllm serve`. Raises InvalidInput for one that cannot be used here."""
    from steer.vllm import plugin

    plugin.register()
    arguments = internals.engine_arguments(model, options)
    given = {"enforce_eager": True, "enable_prefix_caching": False, "worker_cls": internals.WORKER}
    steering = {KEY: {"sites": list(sites), "rank": rank, "rows": 16 * rank}}
    return internals.start_offline(arguments, given, steering)


class VllmSource(Chat):
    """`llm` is an engine of `start`."""

    def __init__(self, llm: Any, name: str, revision: str | None = None) -> None:
        self.llm, self.name, self.revision = llm, name, revision
        self.tokenizer = llm.get_tokenizer()
        self._config = llm.llm_engine.vllm_config

    @property
    def facts(self) -> ModelFacts:
        architecture, layers, d_model = internals.shape_of(self._config)
        return ModelFacts(
            name=self.name,
            revision=self.revision,
            architecture=architecture,
            d_model=d_model,
            layers=layers,
            dtype=internals.dtype_of(self._config),
            chat_template_sha256=self.template_sha256,
        )

    @property
    def context(self) -> int:
        return int(self._config.model_config.max_model_len) - 1  # a prompt is answered with one token

    @property
    def pass_tokens(self) -> int | None:
        return None  # the engine makes its own batches of what it is given

    def encode(self, prompts: Sequence[Prompt], system_prompt: str | None) -> list[Encoded]:
        return encode_all(self, prompts, system_prompt)

    def fingerprint(self) -> str:
        """Of what the engine hands on of a fixed prompt at every layer."""
        ids = list(range(3, 3 + internals.PROBE_TOKENS))
        seen = self.run([Encoded(ids, slice(0, len(ids)))], Reading((-1,), self.facts.layers - 1))
        return hashlib.sha256(seen.picked.numpy().tobytes()).hexdigest()

    def run(self, batch: Sequence[Encoded], reading: Reading) -> Activations:
        """Prefill `batch` and hand out what `reading` asks for; picked vectors are float32.

        Raises EngineFailed where a token of a prompt did not come by.
        """
        from vllm import SamplingParams

        answers = self.llm.collective_rpc(
            "steer_capture", args=(len(batch), len(reading.positions), reading.last_layer)
        )
        if problems := sorted({answer["error"] for answer in answers if answer}):
            raise InvalidInput(problems)
        parameters = []
        for number, e in enumerate(batch):
            at = tuple(p if p >= 0 else len(e.ids) + p for p in reading.positions)
            wish = capture.Wish(number=number, at=at, start=e.own.start, stop=e.own.stop)
            parameters.append(
                SamplingParams(
                    max_tokens=1, temperature=0, detokenize=False, extra_args={capture.KEY: wish.model_dump()}
                )
            )
        self.llm.generate([{"prompt_token_ids": e.ids} for e in batch], parameters, use_tqdm=False)
        d_model = self.facts.d_model
        picked = torch.zeros(len(reading.positions), reading.layers, len(batch), d_model)
        own = torch.zeros(reading.layers, d_model, dtype=torch.float64)
        missing = set(range(reading.layers))
        for answer in self.llm.collective_rpc("steer_captured"):
            if (short := [n for n, e in enumerate(batch) if answer["seen"][n] < len(e.ids)]) and answer["layers"]:
                raise EngineFailed(f"prompts {short} of a batch were not prefilled whole")
            for layer, vectors, sums in answer["layers"]:  # tensor-parallel ranks say the same
                picked[:, layer] = _array(vectors, (len(batch), len(reading.positions), d_model)).transpose(0, 1)
                own[layer] = _array(sums, (len(batch), d_model)).sum(0)
                missing.discard(layer)
        if missing:
            raise EngineFailed(f"the layers {sorted(missing)} were read by no worker")
        return Activations(picked, own)


def _array(data: bytes, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.float64).copy()).reshape(shape)
