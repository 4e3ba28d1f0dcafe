"""Configurations in which steering could not be right are refused before anything starts, all reasons together."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from steer.errors import UnsupportedModel
from steer.vllm import internals


def config(**parts: Any) -> Any:
    """What `check_config` reads of a VllmConfig, with `parts` in place of an ordinary one's."""
    ordinary: dict[str, Any] = dict(
        parallel_config=SimpleNamespace(distributed_executor_backend="mp"),
        cache_config=SimpleNamespace(),
        model_config=SimpleNamespace(runner_type="generate"),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace()),
        offload_config=SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=0)),
        speculative_config=None,
        kv_transfer_config=None,
    )
    return SimpleNamespace(**(ordinary | parts))


def parallel(**fields: Any) -> dict[str, Any]:
    return {"parallel_config": SimpleNamespace(**({"distributed_executor_backend": "mp"} | fields))}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "microbatches": (parallel(use_ubatching=True), "--enable-dbo"),
    "context parallel": (parallel(prefill_context_parallel_size=2), "prefill context parallelism"),
    "sequence-parallel experts": (parallel(use_sequence_parallel_moe=True), "a part of the tokens"),
    "elastic experts": (parallel(enable_elastic_ep=True), "--enable-elastic-ep"),
    "restarts": (parallel(enable_fault_tolerance=True), "--enable-fault-tolerance"),
    "foreign executor": (parallel(distributed_executor_backend=dict), "the executor"),
    "foreign executor by name": (parallel(distributed_executor_backend="collections.OrderedDict"), "the executor"),
    "sequence parallel": (
        {"compilation_config": SimpleNamespace(pass_config=SimpleNamespace(enable_sp=True))},
        "enable_sp",
    ),
    "fused communication": (
        {"compilation_config": SimpleNamespace(pass_config=SimpleNamespace(fuse_gemm_comms=True))},
        "fuse_gemm_comms",
    ),
    "fast prefill": ({"cache_config": SimpleNamespace(kv_sharing_fast_prefill=True)}, "--kv-sharing-fast-prefill"),
    "pooling": ({"model_config": SimpleNamespace(runner_type="pooling")}, "does not generate"),
    "encoder-decoder": (
        {"model_config": SimpleNamespace(runner_type="generate", is_encoder_decoder=True)},
        "encoder-decoder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    parts, sentence = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=re.escape(sentence)):
        internals.config.check_config(config(**parts), readout=False)


def test_an_ordinary_one_is_not() -> None:
    internals.config.check_config(config(), readout=True)
    for backend in ("uni", "mp", "ray", "external_launcher", None):
        internals.config.check_config(config(**parallel(distributed_executor_backend=backend)), readout=False)


def test_all_reasons_are_told_together() -> None:
    parts = parallel(enable_elastic_ep=True, enable_fault_tolerance=True, use_ubatching=True)
    with pytest.raises(UnsupportedModel, match=r"enable-dbo.*; .*elastic.*; .*fault"):
        internals.config.check_config(config(**parts), readout=False)


def test_what_harms_others_in_a_batch_is_refused_where_it_does() -> None:
    own: dict[str, Any] = {"speculative_config": None, "lora_config": None}
    cpu, cuda = ({"device_config": SimpleNamespace(device_type=device)} for device in ("cpu", "cuda"))
    assert internals.config.unsafe_fields(config(**own, **cpu), "V2") == {}
    assert internals.config.unsafe_fields(config(**own, **cuda), "V1").keys() == {"logprob_token_ids"}
    for name, field in (("speculative_config", "top_k"), ("lora_config", "prompt_logprobs")):
        assert internals.config.unsafe_fields(config(**own | {name: object()}, **cuda), "V2") == {}
        assert internals.config.unsafe_fields(config(**own | {name: object()}, **cpu), "V2").keys() == {field}


def test_variables_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    offloading = config(offload_config=SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=4)))
    ray = config(**parallel(distributed_executor_backend="ray"))
    internals.config.check_config(offloading, readout=False)
    for variable, value, given in (
        ("VLLM_USE_RUST_FRONTEND", "1", config()),
        ("VLLM_WEIGHT_OFFLOADING_DISABLE_UVA", "1", offloading),
        ("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0", ray),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            with pytest.raises(UnsupportedModel, match=f"{variable}"):
                internals.config.check_config(given, readout=False)


# -- blocks from elsewhere -------------------------------------------------------------------------------------------


def transfer(connector: str | None, module: str | None = None, **extra: Any) -> Any:
    from vllm.config import KVTransferConfig

    return config(
        kv_transfer_config=KVTransferConfig(
            kv_connector=connector,
            kv_role="kv_both",
            kv_connector_module_path=module,
            kv_connector_extra_config=extra,
        )
    )


def test_a_step_whose_blocks_failed_to_load_is_not_run_again() -> None:
    given = transfer("MooncakeStoreConnector")
    given.kv_transfer_config.kv_load_failure_policy = "recompute"
    with pytest.raises(UnsupportedModel, match="kv_load_failure_policy is not 'fail'"):
        internals.config.check_config(given, readout=False)


def test_every_connector_of_this_vllm_is_decided_on() -> None:
    """A new one is refused until somebody has read what its keys know."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in KVConnectorFactory._registry:
        if name in (*internals.config.HASHED_CONNECTORS, "MultiConnector"):
            internals.config.check_config(transfer(name), readout=False)
            continue
        with pytest.raises(UnsupportedModel, match=f"the KV connector {name}"):
            internals.config.check_config(transfer(name), readout=False)
    assert set(internals.config.HASHED_CONNECTORS) | set(internals.config.DISAGGREGATED) <= set(
        KVConnectorFactory._registry
    )


def test_one_bad_child_of_many_is_enough() -> None:
    good, bad = {"kv_connector": "OffloadingConnector"}, {"kv_connector": "NixlConnector"}
    nested = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [good, bad]}}
    internals.config.check_config(transfer("MultiConnector", connectors=[good, good]), readout=False)
    each: list[list[dict[str, Any]]] = [[good, bad], [nested], [{}]]
    for children in each:
        with pytest.raises(UnsupportedModel, match="the KV connector"):
            internals.config.check_config(transfer("MultiConnector", connectors=children), readout=False)


def test_a_connector_from_elsewhere_is_refused_whatever_its_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"comes from somebody\.else"):
        internals.config.check_config(transfer("OffloadingConnector", "somebody.else"), readout=False)


def test_none_is_none() -> None:
    internals.config.check_config(transfer(None), readout=False)


# -- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.24.0", "0.30.9", "0.5"])
def test_older_ones_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals.base, "version", lambda: version)
    with pytest.raises(UnsupportedModel, match="too old"):
        internals.check_version()


@pytest.mark.parametrize("version", ["0.33.0", "1.0", "dev", "0.0.0"])
def test_newer_ones_are_warned_of(version: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(internals.base, "version", lambda: version)
    monkeypatch.setattr(internals.base.log, "propagate", True)
    with caplog.at_level(logging.WARNING, "steer"):
        internals.check_version()
    assert version in caplog.text


@pytest.mark.parametrize("version", [*internals.base.SUPPORTED, "0.32.1", "0.32.0+cu130", "0.31.2rc1"])
def test_supported_ones_are_neither(version: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(internals.base, "version", lambda: version)
    monkeypatch.setattr(internals.base.log, "propagate", True)
    internals.check_version()
    assert not caplog.text


# -- the probe -------------------------------------------------------------------------------------------------------


def test_layers_that_write_into_an_argument_are_repeatable_too() -> None:
    """Without metadata they may write nothing at all, and their caller gave them memory as it was."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class Writes(nn.Module, AttentionLayerBase):
        get_attn_backend = get_kv_cache_spec = None

        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor, output: torch.Tensor) -> None:
            """As where there is no metadata."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Writes()

        def forward(self, x: torch.Tensor, by_name: bool) -> tuple[torch.Tensor, torch.Tensor]:
            gate, output = torch.ones_like(x), torch.full_like(x, torch.nan)  # what `empty` may give
            if by_name:
                self.mixer(hidden_states=x, gate=gate, output=output)
            else:
                self.mixer(x, gate, output)
            return gate, output

    model, x = Model(), torch.randn(3, 4)
    for by_name in (False, True):
        with internals.worker._repeatable_attention(model):
            gate, output = model(x, by_name)
        assert output.equal(x)
        assert gate.eq(1).all()
