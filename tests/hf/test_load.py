"""What is loaded: models that take images too, packed weights, files that lack something, and names that are none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import steer
from steer.direction import Direction, check_fits
from steer.errors import UnsupportedModel
from steer.hf.batching import start_engine
from steer.hf.load import auto_class, describe, load, read_config
from steer.hf.steering import Anatomy, Steering
from steer.lab.merge import model as merge
from steer.lab.merge.removal import removal
from steer.lab.merge.weights import Checkpoint
from steer.names import Site
from tests import models
from tests.models import relative
from tests.oracle import ablated, orthogonalised

IDS = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module", params=models.WRAPPERS)
def wrapper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("wrappers") / str(request.param)
    models.save(request.param, folder)
    return request.param, folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def projected(model: torch.nn.Module, direction: Direction) -> torch.Tensor:
    """Logits of a pass in which hooks that name the blocks of the text model take the direction away."""
    (text,) = [m for name, m in model.named_modules() if name.endswith(("language_model", "language_model.model"))][-1:]
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out, v=direction.directions[n, 0]: (
                (ablated(out[0], v), *out[1:]) if isinstance(out, tuple) else ablated(out, v)
            )
        )
        for n, block in enumerate(text.layers)
    ]
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


def test_of_a_model_that_sees_the_text_model_is_steered(wrapper: tuple[str, Path]) -> None:
    name, folder = wrapper
    whole, loaded = models.tiny(name), load(str(folder)).model
    assert torch.equal(logits(loaded), logits(whole)), "the checkpoint is that of the whole model"
    direction = models.direction(loaded)
    with steer.attach(loaded, {"d": direction}) as steering, steering("off", "d"):
        served = logits(loaded)
    expected = projected(whole, direction)
    assert torch.equal(served[0], logits(whole)[0])
    assert relative(served[1], expected[1]) <= 1e-4
    assert relative(logits(whole), expected) > 1e-3


def test_a_direction_fits_the_text_model_alone_and_inside_of_the_whole(wrapper: tuple[str, Path]) -> None:
    name, folder = wrapper
    whole = models.tiny(name)
    architecture, layers, d_model = describe(str(folder))
    assert (architecture, layers, d_model) == (Anatomy(whole).architecture, models.LAYERS, models.D_MODEL)
    assert Checkpoint(folder).architecture == architecture
    text = whole.config.get_text_config()
    if type(text) in tf.MODEL_FOR_CAUSAL_LM_MAPPING:  # or it is never alone
        alone = tf.AutoModelForCausalLM.from_config(text)
        check_fits(models.direction(alone), d_model=d_model, layers=layers, architecture=architecture)
        assert Anatomy(alone).architecture == architecture
    older = models.direction(whole).with_meta(architecture=type(whole).__name__)
    if name not in ("llava", "mistral3"):  # whose class says nothing of their text model
        check_fits(older, d_model=d_model, layers=layers, architecture=architecture)


def test_a_model_that_sees_is_answered_as_generate_does(wrapper: tuple[str, Path]) -> None:
    """The engine checks itself: batched, or one request at a time."""
    loaded = load(str(wrapper[1]))
    engine = start_engine(Steering(loaded.model), loaded.eos_ids, context=128, capacity=8, cache_tokens=2048)
    engine.stop()
    batched = engine.description == "continuous batching"
    assert batched == (wrapper[0] not in ("qwen3_5", "llama4_vision")), engine.description


def test_a_model_that_sees_is_baked_in_its_text_model_alone(wrapper: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = wrapper
    model = models.tiny(name)
    removed = removal(models.direction(model, shared=True, embedding=True, sites=("writers",)))
    output = tmp_path / "baked"
    assert merge.bake(Checkpoint(folder), removed, output, digest="0" * 64)[1] is not None
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    beside = [key for key in before if "vis" in key or "projector" in key]
    assert beside
    assert all(torch.equal(before[key], after[key]) for key in beside)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    if name not in ("gemma3_vision", "llama4_vision"):  # whose oracles are those of their text models
        expected = logits(orthogonalised(model, removed.direction.directions[0, 0]))
        assert relative(logits(load(str(output)).model), expected) < 1e-4


def test_weights_that_are_not_there_are_not_made_up(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tiny_folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"lack 1 weights of LlamaForCausalLM.*model.layers.1.mlp.down_proj"):
        load(str(tmp_path))


class Packed(torch.nn.Linear):
    """A weight in 8 bits with a scale for each row, unpacked at each call, as quantised checkpoints have it."""

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 100
        self.weight = torch.nn.Parameter((weight / scale).round().to(dtype), requires_grad=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1"),
        ("model.safetensors", ""),
        ("tokenizer.json", "{}"),
        ("config.json", '{"model_type": "llama", "hidden_size": "32"}'),
    ],
)
def test_a_file_that_is_damaged_is_said_whatever_transformers_raises(
    tiny_folder: Path, tmp_path: Path, file: str, content: str
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / file).write_text(content)
    with pytest.raises(UnsupportedModel, match=r"a file of it cannot be read \(.*fetch it again"):
        load(str(folder))


@pytest.mark.parametrize("packed", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("site", ["resid_post", "writers"])
def test_the_dtype_is_that_of_the_stream_and_not_of_packed_weights(packed: torch.dtype, site: Site) -> None:
    model = models.tiny("llama", torch.bfloat16)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(part, name, Packed(linear, packed))
    assert next(model.model.layers[0].parameters()).dtype == packed
    steering = Steering(model, sites=(site,))
    assert steering.anatomy.dtype == torch.bfloat16


def test_a_stream_that_is_scaled_is_refused_whatever_the_weights_are_packed_in() -> None:
    """By the rounding of float8 anything would pass."""
    model = models.tiny("llama", torch.bfloat16)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(part, name, Packed(linear, torch.float8_e5m2))
        block.register_forward_hook(lambda _m, _a, out: out * torch.linspace(0.8, 1.2, out.shape[-1], dtype=out.dtype))
    with pytest.raises(UnsupportedModel, match="site 'writers'"):
        Steering(model, sites=("writers",))


REMOTE = """
import transformers
class OwnConfig(transformers.LlamaConfig):
    model_type = "its_own"
class OwnModel(transformers.LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_it_is_trusted(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    folder = tmp_path / "own"
    shutil.copytree(tiny_folder, folder)
    (folder / "own.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "its_own", "auto_map": auto}))
    with pytest.raises(UnsupportedModel, match="--trust-remote-code"):
        load(str(folder))
    assert not caplog.records
    loaded = load(str(folder), trust_remote_code=True)
    assert "remote code is trusted" in caplog.text
    assert type(loaded.model).__name__ == Anatomy(loaded.model).architecture == "OwnModel"


def test_devices_are_named_once() -> None:
    with pytest.raises(UnsupportedModel, match="leave the device 'cpu' out"):
        load("nowhere", device="cpu", device_map="auto")
    with pytest.raises(UnsupportedModel, match="'balanced' is not known; accepted: auto"):
        load("nowhere", device_map="balanced")


def test_what_is_placed_by_accelerate_is_steered(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder), device_map="auto")
    direction = models.direction(loaded.model)
    with steer.attach(loaded.model, {"d": direction}) as steering, steering("d"):
        served = logits(loaded.model)
    with steer.attach(plain := load(str(tiny_folder)).model, {"d": direction}) as steering, steering("d"):
        assert torch.equal(served, logits(plain))


def test_a_template_that_reads_parts_gets_parts(tiny_folder: Path) -> None:
    """Those of models that take images leave a string out without a word."""
    loaded = load(str(tiny_folder))
    strings = loaded.chat_ids([{"role": "user", "content": "hello"}])
    loaded.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {% for c in m['content'] | selectattr('type', "
        "'equalto', 'text') %}{{ c['text'] }}{% endfor %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    assert loaded.chat_ids([{"role": "user", "content": "hello"}]) == strings
    assert loaded.chat_ids([{"role": "user", "content": [{"type": "text", "text": "hello"}]}]) == strings


def test_the_template_that_a_processor_keeps_is_the_tokenizers(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    template = load(str(tmp_path)).tokenizer.chat_template
    (tmp_path / "chat_template.jinja").unlink()
    assert not load(str(tmp_path)).tokenizer.chat_template
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load(str(tmp_path)).tokenizer.chat_template == template


def test_a_model_with_an_encoder_is_refused(tmp_path: Path) -> None:
    for model_type in ("t5", "florence2", "vit"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(UnsupportedModel, match=f"{model_type}.*accepted: a causal language model") as caught:
            auto_class(str(tmp_path), read_config(str(tmp_path)), whole=True)
        assert len(str(caught.value)) < 400


def test_a_gguf_file_is_a_model(tiny_folder: Path, tmp_path: Path) -> None:
    model, path = models.tiny("llama"), tmp_path / "tiny.gguf"
    models.save_gguf(model, path)
    loaded, folder = load(str(path)), load(str(tiny_folder))
    assert torch.equal(logits(loaded.model), logits(model))
    assert describe(str(path)) == describe(str(tiny_folder))
    messages: list[dict[str, object]] = [{"role": "user", "content": "hello"}]
    assert loaded.chat_ids(messages) == folder.chat_ids(messages)
    with pytest.raises(UnsupportedModel, match="there is no such folder"):
        load(str(tmp_path / "other.gguf"))


@pytest.mark.parametrize("begins", [True, False])
def test_texts_begin_and_turns_end_as_a_gguf_file_says(begins: bool, tmp_path: Path) -> None:
    """transformers reads neither: Gemma answers nonsense without its first token, and a chat would not end."""
    path = tmp_path / "tiny.gguf"
    models.save_gguf(models.tiny("llama"), path, begins=begins, turn_end=4)
    loaded = load(str(path))
    assert (loaded.tokenizer("hello").input_ids[0] == 1) is begins
    assert loaded.tokenizer("hello", add_special_tokens=False).input_ids[0] != 1
    assert loaded.eos_ids == [2, 4]


ASKED = """
import sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
asked = []
class Broken(BaseHTTPRequestHandler):
    def do_HEAD(self):
        asked.append(self.path)
        self.send_error(503)
    do_GET = do_HEAD
    def log_message(self, *_):
        pass
server = HTTPServer(("127.0.0.1", 0), Broken)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from steer.errors import UnsupportedModel
from steer.hf.load import load
for name in sys.argv[1:]:
    try:
        print(type(load(name).model).__name__)
    except UnsupportedModel as error:
        print(error)
print(*(path for path in asked if path.startswith("/nobody")))
"""


def test_a_hub_that_does_not_answer_is_asked_once(tiny_folder: Path, tmp_path: Path) -> None:
    """transformers would ask again and again for each file, for a minute and more."""
    home = tmp_path / "models--nobody--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text("0" * 40)
    shutil.copytree(tiny_folder, home / "snapshots" / ("0" * 40))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ASKED, "nobody/tiny", "nobody/other"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    cached, other, asked = done.stdout.splitlines()
    assert cached == "LlamaForCausalLM"
    assert "cannot load the model 'nobody/other': there is no such folder" in other
    assert asked == "/nobody/tiny/resolve/main/config.json /nobody/other/resolve/main/config.json"
