"""Served = orthogonalised, plain = untouched, and a refusal to start where a hook point cannot be checked."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf

import steer
from steer.errors import DirectionError, SpecError, UnsupportedModel
from steer.hf.steering import Anatomy, Steering
from steer.names import MODES, Mode
from steer.runtime.bank import EMBEDDING, HookPoint, gather
from steer.runtime.hook_points import find_writers, hooks, on_output
from steer.runtime.token_index import RequestSteer
from steer.spec import Condition, Entry, Spec
from tests import bad, models
from tests.models import IDS, logits, relative
from tests.oracle import ablated, orthogonalised, reference_logits


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_writers_served_equal_orthogonalised_weights(name: str, strength: float) -> None:
    model = models.tiny(name)
    direction = models.direction(model, shared=True, embedding=True, sites=("writers",))
    v = direction.directions[0, 0]
    if name in models.NORM_BEHIND_WRITER:
        expected = reference_logits(model, name, v, IDS, strength)
    else:
        expected = logits(orthogonalised(model, v, strength))
    plain = logits(model)
    with (
        steer.attach(model, {"d": direction}, sites=("writers",)) as steering,
        steering({"direction": "d", "strength": strength}),
    ):
        served = logits(model)
    assert relative(served, expected) <= 1e-4
    assert relative(plain, expected) > 1e-3, "the edit must do something, or the test shows nothing"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3", "mixtral"])
def test_bfloat16_is_as_exact_as_storing_bfloat16(name: str) -> None:
    """Served in bfloat16, and orthogonalised weights stored in bfloat16: both are as far from the float32 truth."""
    exact, stored = models.tiny(name), models.tiny(name, torch.bfloat16)
    direction = models.direction(exact, shared=True, embedding=True, sites=("writers",))
    v = direction.directions[0, 0]
    if name in models.NORM_BEHIND_WRITER:
        truth, edited = (reference_logits(m, name, v, IDS).float() for m in (exact, stored))
    else:
        truth, edited = (logits(orthogonalised(m, v)).float() for m in (exact, stored))
    with steer.attach(stored, {"d": direction}, sites=("writers",)) as steering, steering("d"):
        served = logits(stored).float()
    rounding = relative(edited, truth)
    assert relative(served, truth) <= 2 * rounding + 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_at_some_layers_it_is_the_direction_that_has_no_others(mode: Mode) -> None:
    model = models.tiny("llama")
    whole = models.direction(model, seed=3, embedding=True, plane=True)
    assert whole.axis is not None
    rows, axis = whole.directions.clone(), whole.axis.clone()
    rows[[0, *range(3, models.LAYERS)]], axis[[0, *range(3, models.LAYERS)]] = 0, 0
    part = replace(whole, directions=rows, axis=axis, embedding=None)
    with steer.attach(model, {"whole": whole, "part": part}) as steering:
        for ours, theirs in (("@1-2=0.7", "=0.7"), ("@1-2=-1", "=-1")):
            with steering(f"whole:{mode}{ours}"):
                made = logits(model)
            with steering(f"part:{mode}{theirs}"):
                expected = logits(model)
            with steering(f"whole:{mode}@1-2=0.7", f"part:{mode}=0.7"):
                beside = logits(model)
            assert torch.equal(made, expected)
            assert torch.equal(beside[0], beside[1]) == torch.equal(IDS[0], IDS[1])
        with steering(f"whole:{mode}=0.7"):
            assert not torch.equal(logits(model), made)
        for layers, message in ((f"1-{models.LAYERS}", "the model has the layers 0 to"), ("0", "does nothing at")):
            with pytest.raises(SpecError, match=message), steering(f"part@{layers}"):
                pass


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_hooks_leave_plain_passes_bit_equal(name: str) -> None:
    model = models.tiny(name, torch.bfloat16)
    before = logits(model)
    with steer.attach(model, {"d": models.direction(model)}, sites=("resid_post", "writers")) as steering:
        inside = logits(model)
        with steering("off", "d"):
            beside = logits(model)
    assert torch.equal(before, inside)
    assert torch.equal(before[0], beside[0]), "a plain row beside a steered one"
    assert not torch.equal(before[1], beside[1])
    assert torch.equal(before, logits(model)), "and nothing stays behind"


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_each_layers_own_direction_is_gone_from_its_output(name: str) -> None:
    model = models.tiny(name)
    direction = models.direction(model, k=2)
    seen: dict[int, torch.Tensor] = {}
    with steer.attach(model, {"d": direction}) as steering, steering("d"):
        for layer, block in enumerate(Anatomy(model).blocks):
            block.register_forward_hook(
                lambda _m, _a, out, n=layer: seen.__setitem__(n, out[0] if isinstance(out, tuple) else out)
            )
        logits(model)
    for layer in range(models.LAYERS):
        components = seen[layer] @ direction.directions[layer].T
        assert float(components.abs().max()) <= 1e-4 * float(seen[layer].norm(dim=-1).max())


def test_rows_of_a_batch_are_steered_one_by_one() -> None:
    model = models.tiny("llama")
    d, e = models.direction(model, seed=1), models.direction(model, seed=2)
    with steer.attach(model, {"d": d, "e": e}) as steering:
        with steering("d"):
            alone = logits(model)[0]
        with steering("d", "e=0.5"):
            mixed = logits(model)
        with steering("e=0.5"):
            other = logits(model)[1]
    torch.testing.assert_close(mixed[0], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], other, rtol=1e-5, atol=1e-5)


def test_a_batch_inside_a_batch_ends_with_the_outer_one() -> None:
    model = models.tiny("llama")
    with steer.attach(model, {"d": models.direction(model, seed=1)}) as steering:
        with steering("d"):
            steered = logits(model)
            with steering("off"):
                inner = logits(model)
            assert torch.equal(logits(model), steered)
        assert torch.equal(logits(model), inner)
        assert not torch.equal(inner, steered)


def test_passes_that_repeat_gather_no_rows_anew_and_see_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of an engine is a batch of the same requests again: what the pass before gathered is used until the
    requests or the rows change."""
    model, rng, gathered = models.tiny("llama"), random.Random(3), list[object]()
    steering = Steering(model, rank=3)
    bank, directions = steering.bank, [models.direction(model, seed=seed, plane=True) for seed in range(3)]
    for name in "de":
        bank.load(name, directions[0])
    if_harmful = Condition("d", 0, 0.1, digest="d", each=True)
    entries = [
        *(Entry("d", "d", mode, 1.0) for mode in MODES),
        Entry("e", "e", "ablate", 0.5),
        Entry("d", "d", "ablate", 1.0, tokens="answer"),
        Entry("e", "e", "ablate", 1.0, layers="1-2", condition=if_harmful),
    ]
    specs = [Spec(), *(Spec((entry,)) for entry in entries)]

    def steers(which: list[int]) -> list[RequestSteer | None]:
        return [bank.steer(specs[i], prompt=6) for i in which]

    def gathering(*given: Any) -> Any:
        gathered.append(given)
        return gather(*given)

    monkeypatch.setattr("steer.hf.steering.gather", gathering)
    tokens, asked = IDS.numel(), steers(list(range(len(specs))))
    found = dict[tuple[int, ...], torch.Tensor]()
    ids = IDS.flatten(), torch.arange(tokens)

    def made(batch: list[RequestSteer | None], lengths: list[int] | None, starts: list[int]) -> torch.Tensor:
        gathered.clear()
        with steering.batch(batch, lengths, starts, ids):
            return logits(model)

    steering.attach()
    try:
        for _ in range(60):
            lengths, starts = rng.choice([[3, tokens - 3], [tokens, 0]]), rng.choice([[0, 0], [1, 9], [9, 9]])
            one = rng.randrange(len(specs))
            batches = [[one, rng.choice([0, 0, *range(len(specs))])] for _ in range(6)]
            made([asked[i] for i in batches[0]], lengths, starts)
            if rng.random() < 0.5:
                bank.unload("d")
                bank.load("d", rng.choice(directions))
            for batch in batches:
                parts = [
                    steer and steer.part(*each) for steer, *each in zip(steers(batch), starts, lengths, strict=True)
                ]
                known = all(part or not i for part, i in zip(parts, batch, strict=True))
                found[tuple(batch)] = made([asked[i] for i in batch], lengths, starts)
                again = made([asked[i] for i in batch], lengths, starts)
                assert not (known and gathered)
                assert torch.equal(again, found[tuple(batch)])
            for batch in batches:
                assert torch.equal(made(steers(batch), lengths, starts), found[tuple(batch)])
    finally:
        steering.detach()


def test_two_threads_cannot_steer_one_model_at_once() -> None:
    model = models.tiny("llama")
    with steer.attach(model, {"d": models.direction(model, seed=1)}) as steering, ThreadPoolExecutor(1) as other:

        def second() -> None:
            with steering("off"):
                logits(model)

        with steering("d"):
            steered = logits(model)
            with pytest.raises(RuntimeError, match="another thread"):
                other.submit(second).result()
            assert torch.equal(logits(model), steered)
        other.submit(second).result()


def test_generate_is_steered_at_every_step() -> None:
    model = models.tiny("llama")
    direction = models.direction(model, shared=True, embedding=True, sites=("writers",))
    edited = orthogonalised(model, direction.directions[0, 0])
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(IDS)
    expected = edited.generate(IDS, attention_mask=mask, **options)
    with steer.attach(model, {"d": direction}, sites=("writers",)) as steering, steering("d"):
        assert torch.equal(model.generate(IDS, attention_mask=mask, **options), expected)
    assert not torch.equal(model.generate(IDS, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("factor", [0.5, torch.linspace(0.5, 1.5, models.D_MODEL)])
def test_a_block_may_scale_what_it_adds_by_one_number_and_not_each_dimension_by_its_own(
    factor: float | torch.Tensor,
) -> None:
    model = models.tiny("llama")
    direction = models.direction(model, shared=True, embedding=True, sites=("writers",))

    def scale(model: Any) -> None:
        block = model.model.layers[1]
        inner = block.forward
        block.forward = lambda x, *args, **kwargs: x + factor * (inner(x, *args, **kwargs) - x)

    edited = orthogonalised(model, direction.directions[0, 0])
    scale(model)
    if isinstance(factor, torch.Tensor):
        with pytest.raises(UnsupportedModel, match=r"block 1 .*resid_post"):
            Steering(model, sites=("writers",))
        Steering(model, sites=("resid_post",))
        return
    scale(edited)
    with steer.attach(model, {"d": direction}, sites=("writers",)) as steering, steering("d"):
        assert relative(logits(model), logits(edited)) <= 1e-4


def test_a_child_that_adds_the_stream_itself_is_no_writer() -> None:
    """BLOOM: what its attention and MLP return is the stream with what they add to it."""
    config = tf.BloomConfig(vocab_size=models.VOCABULARY, hidden_size=models.D_MODEL, n_layer=models.LAYERS, n_head=4)
    with pytest.raises(UnsupportedModel, match="write what the block adds to the stream"):
        Steering(tf.AutoModelForCausalLM.from_config(config).eval(), sites=("writers",))


def test_a_missing_block_or_an_inert_hook_refuses_to_start() -> None:
    model = models.tiny("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModel, match="one list of 5 decoder blocks"):
        Anatomy(model)
    with pytest.raises(UnsupportedModel, match=r"one list of 0 decoder blocks .*, found none"):
        Steering(tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**models._shape(num_hidden_layers=0))))
    model = models.tiny("llama")
    skipped = model.model.layers[2]
    skipped.forward = lambda x, *args, **kwargs: x
    model.model.layers[2] = Passing(skipped)
    with pytest.raises(UnsupportedModel, match="layer 2"):
        Steering(model)


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        ("branch", "takes something else"),
        ("beside", "wider than one vector a token"),
        ("twice", "acts more than once"),
        ("functional", "acts more than once"),
        ("part", "takes something else"),
    ],
)
def test_what_is_not_the_stream_refuses_to_start(structure: str, reason: str) -> None:
    model = models.tiny("llama")
    bad.STRUCTURES[structure](model.model, model.model.layers)
    with pytest.raises(UnsupportedModel, match=reason):
        Steering(model)


def test_a_stream_of_several_vectors_a_token_refuses_to_start() -> None:
    shape = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4)
    more = dict(num_key_value_heads=2, head_dim=16, laurel_rank=4, hidden_size_per_layer_input=8)
    config = tf.Gemma3nTextConfig(
        **shape, **more, num_kv_shared_layers=0, vocab_size_per_layer_input=128, activation_sparsity_pattern=[0.0] * 5
    )
    torch.manual_seed(0)
    model = tf.Gemma3nForCausalLM(config).eval()
    with pytest.raises(UnsupportedModel, match="AltUp"):
        Steering(model)


def test_a_model_that_needs_more_than_tokens_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = models.tiny("llama"), tf.LlamaForCausalLM.forward
    needing = lambda self, pixel_values, *args, **kwargs: real(self, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(tf.LlamaForCausalLM, "forward", needing)
    with pytest.raises(UnsupportedModel, match=r"does not run on the ids of tokens alone: .*pixel_values"):
        Steering(model)


def test_a_model_that_drops_at_random_is_asked_into_evaluation() -> None:
    with pytest.raises(UnsupportedModel, match=r"model.eval\(\)"):
        Steering(models.tiny("gpt2").train())


class Passing(torch.nn.Module):
    """A block whose output hook never sees the stream: it puts the stream aside and gives it back later."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block
        self.attention_type = getattr(block, "attention_type", "full_attention")

    def __call__(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return self.block.forward(x)  # not through Module.__call__, so no hook fires


def test_places_cover_every_layer_and_the_embedding() -> None:
    steering = Steering(models.tiny("gpt2"), sites=("resid_post", "writers"))
    expected = {
        HookPoint(site, layer) for site in ("resid_post", "writers") for layer in range(EMBEDDING, models.LAYERS)
    }
    assert set(steering.bank.slices) == expected | {HookPoint("writers", layer, 1) for layer in range(models.LAYERS)}


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_what_a_block_writes_first_is_attentions(name: str) -> None:
    """By which a file's two weights are told apart, also where both are made of the same stream."""
    anatomy = Anatomy(models.tiny(name))
    for block, writers in zip(anatomy.blocks, find_writers(anatomy.blocks, anatomy.probe), strict=True):
        first, second = (next(n for n, m in block.named_children() if m is writer) for writer in writers)
        assert "att" in first, first
        assert any(word in second for word in ("mlp", "feedforward", "feed_forward")), second


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral", "gpt_oss"])
def test_attention_and_mlp_are_weighed_apart(name: str) -> None:
    model = models.tiny(name)
    direction = models.apart(model)
    expected = logits(orthogonalised(model, direction.directions[0, 0], 0.8, models.APART))
    swapped = logits(orthogonalised(model, direction.directions[0, 0], 0.8, models.APART[::-1]))
    with (
        steer.attach(model, {"d": direction}, sites=("writers",)) as steering,
        steering({"direction": "d", "strength": 0.8}),
    ):
        served = logits(model)
    assert relative(served, expected) <= 1e-4
    assert relative(served, swapped) > 1e-3, "the test must tell them apart"


def test_what_has_the_weight_0_is_left_bit_equal() -> None:
    model = models.tiny("llama", torch.bfloat16)
    direction = replace(models.apart(model), weights=torch.zeros(3), mlp_weights=torch.ones(3))
    wrote: dict[tuple[str, bool], torch.Tensor] = {}
    parts = {"attention": model.model.layers[2].self_attn, "mlp": model.model.layers[2].mlp}

    def watch(after: bool) -> None:
        for kind, module in parts.items():
            on_output(module, lambda x, key=(kind, after): wrote.__setitem__(key, x.clone()))

    watch(False)
    with steer.attach(model, {"d": direction}, sites=("writers",)) as steering:
        watch(True)
        with steering("d"):
            logits(model)
    assert torch.equal(wrote["attention", False], wrote["attention", True])
    assert not torch.equal(wrote["mlp", False], wrote["mlp", True])


def test_a_block_that_writes_one_term_cannot_have_two_weights() -> None:
    model = models.tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    direction = models.apart(model)
    assert direction.mlp_weights is not None
    equal = direction.mlp_weights.clone().index_copy_(0, torch.tensor([1]), direction.weights[1:2])
    with steer.attach(model, {"equal": replace(direction, mlp_weights=equal)}, sites=("writers",)) as steering:
        with pytest.raises(DirectionError, match=r"differs from 'weights' at layers \[1\].*equal weights are accepted"):
            steering.load("apart", direction)
        assert list(steering.directions) == ["equal"]


def test_writers_are_the_norms_where_norms_stand_behind_the_writers() -> None:
    for name, expected in {
        "llama": {"self_attn", "mlp"},
        "gemma2": {"post_attention_layernorm", "post_feedforward_layernorm"},
        "olmo2": {"post_attention_layernorm", "post_feedforward_layernorm"},
        "gpt_neox": {"attention", "mlp"},
    }.items():
        anatomy = Anatomy(models.tiny(name))
        writers = find_writers(anatomy.blocks, anatomy.probe)
        names = {n for n, m in anatomy.blocks[0].named_children() if any(m is w for w in writers[0])}
        assert names == expected, name


def test_ablating_twice_is_ablating_once() -> None:
    x, v = (
        torch.randn(5, 8, dtype=torch.float64),
        torch.nn.functional.normalize(torch.randn(8, dtype=torch.float64), dim=0),
    )
    torch.testing.assert_close(ablated(ablated(x, v), v), ablated(x, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stream_that_is_added_up_in_finer_numbers_than_it_begins_in(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=models.VOCABULARY, hidden_size=32, num_hidden_layers=3, state_size=4)
    model = tf.MambaForCausalLM(config).to(dtype).eval()
    direction = models.direction(model)
    seen: list[torch.Tensor] = []
    with steer.attach(model, {"d": direction}) as steering, steering("d:ablate"), torch.no_grad():
        with hooks([on_output(model.backbone.layers[0], seen.append)]):
            model(input_ids=torch.arange(3, 9)[None], use_cache=False)
    assert (seen[0].dtype, len(seen)) == (torch.float32, 1)
    assert (seen[0][0] @ direction.directions[0, 0]).abs().max() < 1e-5 * seen[0].norm(dim=-1).max()


def test_a_stream_as_wide_as_that_of_large_models_starts() -> None:
    """With a token that is much longer than the others, as the first of real models is. All rounding of a norm that is
    kept lies along the stream, and what is allowed along one direction falls with the width."""
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=1, head_dim=16)
    shape = dict(hidden_size=4096, intermediate_size=64, num_hidden_layers=1, vocab_size=128)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape, **heads)).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[11].mul_(1e3)
    Steering(model)


def test_no_stream_is_asked_to_be_finer_than_the_bank() -> None:
    Steering(models.tiny("llama", torch.float64))
