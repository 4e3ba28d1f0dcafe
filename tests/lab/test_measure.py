"""Measuring: the means are those of plain forward passes however they are batched, under the server's own template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from steer.direction import Direction
from steer.errors import InvalidInput, UnsupportedModel
from steer.hf.load import Loaded, load
from steer.lab.derive import Recipe, derive
from steer.lab.measure import ClassSums, MeasurementOptions, _check_room, measure
from steer.lab.measurement import Measurement, ModelFacts
from steer.lab.prompts import Encoded, PromptSet, Rendering, encode_all
from steer.lab.source import Capture, CapturePlan, TransformersSource, prompt_components
from tests import models
from tests.hf.test_engine import longrope, started

HARMFUL = PromptSet("harmful", "0" * 64, tuple("abc" * n + "?" for n in range(1, 14)))
HARMLESS = PromptSet("harmless", "1" * 64, tuple("xy " * n + "z" for n in range(1, 14)))


@pytest.fixture(scope="module")
def source(loaded: Loaded) -> TransformersSource:
    return TransformersSource(loaded)


def naive(
    loaded: Loaded, prompts: PromptSet, position: int, system: str | None = None
) -> tuple[torch.Tensor, list[Any]]:
    """Means by one prompt at a time and `output_hidden_states`, which holds inputs of blocks: hence the hooks here."""
    rows, everything = [], []
    for prompt in prompts.prompts:
        ids = encode_all(loaded, [prompt], Rendering(system))[0].ids
        outputs: list[torch.Tensor] = []
        handles = [
            b.register_forward_hook(lambda _m, _a, o, to=outputs: to.append(o)) for b in loaded.model.model.layers
        ]
        with torch.no_grad():
            loaded.model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        rows.append(torch.stack([x[0, position].double() for x in outputs]))
        everything.append(torch.stack([x[0].double() for x in outputs]))
    return torch.stack(rows).mean(0), everything


@pytest.mark.parametrize("position", [-1, -4, 2])
def test_means_are_those_of_plain_forward_passes(loaded: Loaded, source: TransformersSource, position: int) -> None:
    m = measure(source, HARMFUL, HARMLESS, MeasurementOptions((position,)), batch_size=5)
    torch.testing.assert_close(m.harmful.mean[0], naive(loaded, HARMFUL, position)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.harmless.mean[0], naive(loaded, HARMLESS, position)[0], rtol=1e-5, atol=1e-5)


def test_the_mean_over_all_positions_is_over_the_prompts_own_text(loaded: Loaded, source: TransformersSource) -> None:
    m = measure(source, HARMFUL, HARMLESS)
    _, everything = naive(loaded, HARMLESS, -1)
    own = []
    for prompt, x in zip(map(str, HARMLESS.prompts), everything, strict=True):
        ids = encode_all(loaded, [prompt])[0].ids
        start = len(loaded.tokenizer("<bos>[user] ", add_special_tokens=False).input_ids)
        assert loaded.tokenizer.decode(ids[start : start + len(prompt)]) == prompt
        own.append(x[:, start : start + len(prompt)])
    assert m.harmless.mean_all is not None
    torch.testing.assert_close(m.harmless.mean_all, torch.cat(own, dim=1).mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("winsorize", [None, 0.9])
def test_the_result_does_not_depend_on_batching(source: TransformersSource, winsorize: float | None) -> None:
    def with_size(size: int) -> Measurement:
        options = MeasurementOptions((-1, -3), winsorize, vectors=True, moments=True)
        return measure(source, HARMFUL, HARMLESS, options, batch_size=size)

    one, many = with_size(1).tensors(), with_size(13).tensors()
    assert len(one) == 8
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, many[name], rtol=1e-2 if "vectors" in name else 1e-5, atol=1e-4)


def test_nor_on_the_longest_prompt_where_the_rotary_embedding_does(tmp_path: Path) -> None:
    for made in started(longrope()):
        made.model.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    source = TransformersSource(load(str(tmp_path)))
    one, many = (measure(source, HARMFUL, HARMLESS, batch_size=size) for size in (1, 13))
    torch.testing.assert_close(one.harmful.mean, many.harmful.mean, rtol=1e-5, atol=1e-5)
    rows = torch.eye(models.D_MODEL)[: models.LAYERS]
    encoded = source.encode(HARMFUL.prompts, None)
    assert len({len(each.ids) > 32 for each in encoded}) == 2
    components = (prompt_components(source, rows, encoded, size) for size in (1, 13))
    torch.testing.assert_close(next(components), next(components), rtol=1e-5, atol=1e-5)


def test_winsorising_changes_the_means(source: TransformersSource) -> None:
    clipped = measure(source, HARMFUL, HARMLESS, MeasurementOptions(winsorize=0.9))
    assert not torch.allclose(clipped.harmful.mean, measure(source, HARMFUL, HARMLESS).harmful.mean)


def test_vectors_and_moments_are_of_the_same_activations_as_the_means(source: TransformersSource) -> None:
    m = measure(source, HARMFUL, HARMLESS, MeasurementOptions((-1, 2), vectors=True, moments=True), batch_size=4)
    for statistics in (m.harmful, m.harmless):
        assert statistics.vectors is not None
        assert statistics.moments is not None
        rows = statistics.vectors.double()
        torch.testing.assert_close(rows.mean(2), statistics.mean, rtol=0.02, atol=0.02)
        moments = torch.einsum("plnd,plne->plde", rows, rows) / 13
        torch.testing.assert_close(moments, statistics.moments, rtol=0.05, atol=0.05)


def test_vectors_are_in_the_order_of_the_prompts(loaded: Loaded, source: TransformersSource) -> None:
    m = measure(source, HARMFUL, HARMLESS, MeasurementOptions(vectors=True), batch_size=4)
    assert m.harmful.vectors is not None
    for number, prompt in enumerate(HARMFUL.prompts):
        alone, _ = naive(loaded, PromptSet("one", "0" * 64, (prompt,)), -1)
        torch.testing.assert_close(m.harmful.vectors[0, :, number].double(), alone, rtol=0.01, atol=0.01)


def test_layers_above_the_last_wanted_one_are_not_run(loaded: Loaded, source: TransformersSource) -> None:
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, b in enumerate(loaded.model.model.layers)]
    m = measure(source, HARMFUL, HARMLESS, MeasurementOptions(last_layer=1), batch_size=13)
    for handle in handles:
        handle.remove()
    assert sorted(set(ran)) == [0, 1]
    assert m.layers == 2
    whole = measure(source, HARMFUL, HARMLESS, batch_size=13)
    torch.testing.assert_close(m.harmful.mean, whole.harmful.mean[:, :2], rtol=0, atol=0)


class Failing(TransformersSource):
    """Dies behind so many batches, as a process that is killed does."""

    left = 3

    def run(self, *args: Any) -> Any:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().run(*args)


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_an_interrupted_measurement_goes_on_with_the_same_result(
    loaded: Loaded, source: TransformersSource, tmp_path: Path, batches: int
) -> None:
    partial = tmp_path / "m.part"
    options = MeasurementOptions((-1, -2), vectors=True, moments=True)
    dying = Failing(loaded)
    dying.left = batches
    with pytest.raises(KeyboardInterrupt):
        measure(dying, HARMFUL, HARMLESS, options, batch_size=4, partial=partial)
    going_on = Failing(loaded)
    going_on.left = 8 - batches  # 13 prompts a class are 4 batches: not one is run twice
    m = measure(going_on, HARMFUL, HARMLESS, options, batch_size=4, partial=partial)
    whole = measure(source, HARMFUL, HARMLESS, options, batch_size=4)
    for name, tensor in m.tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_interrupted_while_a_batch_is_added_counts_no_prompt_twice(
    source: TransformersSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """In the middle of it, or after it and before it is noted."""
    partial, options = tmp_path / "m.part", MeasurementOptions(vectors=True, moments=True)
    add, left = ClassSums.add, [3]

    def interrupted(self: ClassSums, indices: Any, activations: Any) -> None:
        left[0] -= 1
        if left[0] or whole:
            add(self, indices, activations)
        else:
            self.sums += activations.picked.double().sum(2)
        if not left[0]:
            raise KeyboardInterrupt

    expected = measure(source, HARMFUL, HARMLESS, options, batch_size=4)
    monkeypatch.setattr(ClassSums, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(source, HARMFUL, HARMLESS, options, batch_size=4, partial=partial, every=0)
    monkeypatch.setattr(ClassSums, "add", add)
    assert partial.exists(), "what was whole before"
    found = measure(source, HARMFUL, HARMLESS, options, batch_size=4, partial=partial)
    for name, tensor in found.tensors().items():
        assert torch.equal(tensor, expected.tensors()[name]), name


def test_sums_of_another_measurement_are_not_added_to(
    loaded: Loaded, source: TransformersSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    partial = tmp_path / "m.part"
    with pytest.raises(KeyboardInterrupt):
        measure(Failing(loaded), HARMFUL, HARMLESS, batch_size=4, partial=partial)
    with_system = MeasurementOptions(rendering=Rendering("be brief"))
    m = measure(source, HARMFUL, HARMLESS, with_system, batch_size=4, partial=partial)
    assert "another model, set or condition" in caplog.text
    assert torch.equal(m.harmful.mean, measure(source, HARMFUL, HARMLESS, with_system, batch_size=4).harmful.mean)
    partial.write_bytes(b"rubbish")
    measure(source, HARMFUL, HARMLESS, batch_size=4, partial=partial)
    assert "starting again" in caplog.text


def test_every_prompt_begins_with_one_bos_as_on_the_server(loaded: Loaded, tiny_server: Any) -> None:
    """The tokenizer adds a BOS and so does the template: together they would be two."""
    assert loaded.bos_count(loaded.text_ids("x")) == 1
    assert measure(TransformersSource(loaded), HARMFUL, HARMLESS).meta.bos_count == 1
    ids = encode_all(loaded, ["hello"])[0].ids
    assert loaded.bos_count(ids) == 1
    assert tiny_server.chat("hello").json()["usage"]["prompt_tokens"] == len(ids)


THINKING = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% if enable_thinking is defined and not enable_thinking %}<>"
    "{% endif %}{% endif %}"
)


def test_a_rendering_is_part_of_what_is_measured_and_of_the_file(tiny_folder: Path) -> None:
    """The variables of the template, and what answers have begun with."""
    loaded = load(str(tiny_folder))
    loaded.tokenizer.chat_template = THINKING
    source, off = TransformersSource(loaded), Rendering(template={"enable_thinking": False})
    plain, ended = encode_all(loaded, ["hello"])[0], encode_all(loaded, ["hello"], off)[0]
    begun = encode_all(loaded, ["hello"], Rendering(response_prefix="<>"))[0]
    assert ended.ids == begun.ids == plain.ids + loaded.piece_ids("<>")
    assert ended.own == begun.own == plain.own, "what the user has written is the same"
    measured = {
        name: measure(source, HARMFUL, HARMLESS, MeasurementOptions(rendering=rendering))
        for name, rendering in (("plain", Rendering()), ("off", off))
    }
    assert not torch.equal(measured["plain"].harmful.mean, measured["off"].harmful.mean)
    directions = {name: derive(m, Recipe(layer=1)) for name, m in measured.items()}
    assert directions["off"].meta.template == {"enable_thinking": False}
    assert Direction.from_bytes(directions["off"].to_bytes()).meta == directions["off"].meta
    assert b"template\\" not in directions["plain"].to_bytes(), "a file without it is one of earlier versions too"
    with pytest.raises(InvalidInput, match="does not mention 'enable_thinkng'"):
        source.encode(["hello"], Rendering(template={"enable_thinkng": False}))
    loaded.tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InvalidInput, match="--system-prompt: the chat template of this model leaves it out"):
        source.encode(["hello"], Rendering(system_prompt="Answer briefly."))
    loaded.tokenizer.chat_template = THINKING
    for name in ("messages", "conversation", "add_generation_prompt", "chat_template", "self"):
        with pytest.raises(InvalidInput, match=f"'{name}' cannot be set"):  # a direction's file may say it
            source.encode(["hello"], Rendering(template={name: False}))


def test_a_system_prompt_is_part_of_what_is_measured(loaded: Loaded) -> None:
    with_system = measure(
        TransformersSource(loaded), HARMFUL, HARMLESS, MeasurementOptions(rendering=Rendering("be brief"))
    )
    expected, _ = naive(loaded, HARMFUL, -1, "be brief")
    torch.testing.assert_close(with_system.harmful.mean[0], expected, rtol=1e-5, atol=1e-5)


def test_bad_sets_and_conditions_are_refused(source: TransformersSource) -> None:
    with pytest.raises(InvalidInput, match="1 prompts are in both"):
        measure(source, HARMFUL, PromptSet("mixed", "2" * 64, (HARMFUL.prompts[0], "other")))
    with pytest.raises(InvalidInput, match=r"long, row 2: has \d+ tokens; the context is 512"):
        measure(source, HARMFUL, PromptSet("long", "2" * 64, ("short", "x" * 600)))
    with pytest.raises(InvalidInput, match="so no position -100"):
        measure(source, HARMFUL, HARMLESS, MeasurementOptions((-1, -100)))
    with pytest.raises(InvalidInput, match="is listed twice"):
        measure(source, HARMFUL, HARMLESS, MeasurementOptions((-1, -1)))
    with pytest.raises(InvalidInput, match="layers 0 to 2"):
        measure(source, HARMFUL, HARMLESS, MeasurementOptions(last_layer=3))


def test_a_padded_batch_is_read_without_its_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = [Encoded([1] * n, slice(1, n - 1)) for n in (5, 3, 7)]
    streams = [torch.randn(len(e.ids), 8, generator=generator) for e in batch]
    capture = Capture(batch, CapturePlan((-1, 0, -2), 0), 7)
    capture.take(0, torch.nn.utils.rnn.pad_sequence(streams, batch_first=True, padding_value=9e9))
    read = capture.read()
    expected = torch.stack([torch.stack([stream[at] for stream in streams]) for at in (-1, 0, -2)])
    assert torch.equal(read.picked[:, 0], expected)
    own = sum(s[e.own].double().sum(0) for s, e in zip(streams, batch, strict=True))
    torch.testing.assert_close(read.own[0], own, rtol=1e-6, atol=1e-6)


def test_a_model_that_looks_ahead_sees_no_padding() -> None:
    """PaliGemma without an image takes all of a text for its prefix."""
    gemma = tf.GemmaConfig(**models._SHAPE)
    seeing = models.wrappers()["gemma3_vision"].vision_config
    torch.manual_seed(0)
    model = tf.PaliGemmaForConditionalGeneration(tf.PaliGemmaConfig(text_config=gemma, vision_config=seeing)).eval()
    source = TransformersSource(Loaded("tiny", None, model, models.tokenizer()))
    alone, together = (measure(source, HARMFUL, HARMLESS, batch_size=size) for size in (1, None))
    torch.testing.assert_close(together.harmful.mean, alone.harmful.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.harmful.mean_all, alone.harmful.mean_all, rtol=1e-4, atol=1e-4)


def gemma3n() -> Any:
    """A stream of four vectors for each token."""
    shape = models._shape(
        num_hidden_layers=4,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=models.VOCABULARY,
        laurel_rank=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return tf.Gemma3nForCausalLM(tf.Gemma3nTextConfig(**shape))


def mllama() -> Any:
    """A layer that runs where there is an image."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = tf.MllamaTextConfig(**models._shape("head_dim", cross_attention_layers=[1], rope_parameters=rope))
    return tf.MllamaForCausalLM(config)


def blip2() -> Any:
    """An image comes with each text."""
    text = tf.OPTConfig(vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, ffn_dim=96)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    config = tf.Blip2Config(text_config=text.to_dict(), vision_config=sizes | {"image_size": 28}, qformer_config=sizes)
    return tf.Blip2ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (gemma3n, "a stream that is wider than one vector a token"),
        (mllama, "block 1 does not run"),
        (blip2, "does not run on the ids of tokens alone: .*pixel_values"),
    ],
)
def test_a_model_that_cannot_be_steered_is_refused_before_any_work(model: Any, why: str, tiny_folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        TransformersSource(replace(load(str(tiny_folder)), model=model().eval()))


def test_what_does_not_fit_in_memory_is_refused_before_anything_runs() -> None:
    facts = ModelFacts(name="m", architecture="A", d_model=2**20, layers=100)
    with pytest.raises(InvalidInput, match="GiB of memory"):
        _check_room(MeasurementOptions(moments=True), CapturePlan((-1,), 99), facts, 10)


def test_activations_that_are_not_finite_are_named(tiny_folder: Path) -> None:
    broken = load(str(tiny_folder))
    with torch.no_grad():
        broken.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(InvalidInput, match=r"not finite at layers \[1, 2\]"):
        measure(TransformersSource(broken), HARMFUL, HARMLESS)


def test_out_of_memory_halves_the_batch_and_goes_on(loaded: Loaded) -> None:
    """A forward pass that fails for more than three prompts, as an accelerator that is full does."""
    decoder = loaded.model.model
    inner, sizes = decoder.forward, []

    def limited(*args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].shape[0])
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("too much")
        return inner(*args, **kwargs)

    source = TransformersSource(loaded)
    expected = measure(source, HARMFUL, HARMLESS)
    decoder.forward = limited
    try:
        got = measure(source, HARMFUL, HARMLESS, batch_size=13)
    finally:
        decoder.forward = inner
    assert sizes[:3] == [13, 6, 3]
    assert max(sizes[2:]) == 3, "and the second class begins with what was found"
    torch.testing.assert_close(got.harmful.mean, expected.harmful.mean, rtol=1e-5, atol=1e-5)


def test_a_model_without_a_chat_template_is_named(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    with pytest.raises(InvalidInput, match="has no chat template"):
        measure(TransformersSource(loaded), HARMFUL, HARMLESS)


def test_encode_marks_the_prompts_own_tokens() -> None:
    made = models.tokenizer()
    loaded = Loaded("tiny", None, models.tiny("llama"), made)
    for prompt in ("hello there", "a", "[user]", "x" * 40):
        encoded = encode_all(loaded, [prompt])[0]
        assert made.decode(encoded.ids[encoded.own]) in prompt
        assert len(encoded.ids[encoded.own]) >= len(prompt) - 1
