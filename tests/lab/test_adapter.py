"""A LoRA adapter computes what the runtime serves at `writers`; what it cannot reach, or what fails, leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steer.errors import InvalidInput, UnsupportedModel
from steer.lab.merge import adapter
from steer.lab.merge.adapter import CONFIG, WEIGHTS, export
from steer.lab.merge.removal import removal
from steer.lab.merge.weights import Checkpoint
from tests import models, oracle
from tests.lab.test_merge import IDS, at_writers, logits, relative, served

#: Whose writers have biases, or experts that are no modules: no adapter reaches those.
NO_ADAPTER = ("gpt2", "gpt_neox", "phi", "mixtral", "qwen3_moe", "gpt_oss", "llama4")


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", [n for n in models.ARCHITECTURES if n not in NO_ADAPTER])
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_the_adapter_equals_served_or_the_reference(name: str, k: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = models.save(name, tmp_path / "model")
    direction = at_writers(model, k=k)
    made = export(Checkpoint(tmp_path / "model"), removal(direction, 0.8), tmp_path / "adapter", base="m")
    assert made.count == 2 * models.LAYERS + 1
    assert made.verdict is not None
    assert made.verdict.logits is not None
    assert made.verdict.logits <= 1e-4
    if name not in models.NORM_BEHIND_WRITER:
        expected = served(model, direction, 0.8)
    elif k == 1:
        expected = oracle.reference_logits(model, name, direction.directions[0, 0], IDS, 0.8, before=True)
    else:
        return
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert relative(logits(adapted), expected) <= 1e-4


@pytest.mark.parametrize("name", NO_ADAPTER)
def test_what_an_adapter_cannot_reach_is_refused(name: str, tmp_path: Path) -> None:
    model = models.save(name, tmp_path / "model")
    says = "bias with a component" if name in ("gpt2", "gpt_neox", "phi") else "no module of its own"
    with pytest.raises(UnsupportedModel, match=says):
        export(Checkpoint(tmp_path / "model"), removal(at_writers(model)), tmp_path / "adapter", base="m")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("spoilt", ["scale", "factor"])
def test_an_adapter_that_does_something_else_is_found_by_its_effect_and_not_kept(
    spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is verified is what was written: read again from the files, as PEFT reads them."""
    model = models.save("llama", tmp_path / "model")
    given: dict[str, Any] = dict(output=tmp_path / "adapter", base="m")
    checkpoint, removed, factors = Checkpoint(tmp_path / "model"), removal(at_writers(model)), adapter._factors

    def wrong(*args: Any) -> dict[str, torch.Tensor]:
        found = factors(*args)
        return {
            name: -t if spoilt == "factor" and "layers.1.mlp" in name and "_A" in name else t
            for name, t in found.items()
        }

    monkeypatch.setattr(adapter, "_factors", wrong)
    if spoilt == "scale":
        config = adapter._config
        monkeypatch.setattr(adapter, "_config", lambda *args: config(*args) | {"lora_alpha": 2})
    with pytest.raises(UnsupportedModel, match="Nothing was kept"):
        export(checkpoint, removed, **given)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert export(checkpoint, removed, verified=False, **given).verdict is None
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {WEIGHTS, CONFIG}
    with pytest.raises(InvalidInput, match="exists already"):
        export(checkpoint, removed, **given)
