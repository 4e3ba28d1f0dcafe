"""Trying out: a row of a batch of many candidates is what it would be alone, and ends no later than it must."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import InvalidInput, NoRoom, SpecError, UnsupportedModel
from steer.hf.internals import whole_cache
from steer.hf.load import Loaded, load
from steer.hf.steering import Steering
from steer.lab.behaviour import REFUSAL, Behaviour
from steer.lab.evaluation.report import DivergenceOf
from steer.lab.evaluator import Candidate, first_tokens
from steer.lab.probe import HFEvaluator, cache_bytes, kl_divergence, last_logits
from steer.lab.prompts import Rendering, encode_all
from steer.spec import PHASES, Condition, Entry, Spec
from steer.tokenization import Thinking
from tests import models
from tests.hf.test_engine import RECURRENT, longrope, started
from tests.oracle import acting

PROMPTS = ["a", "some words of a prompt", "xyz?", "a longer prompt, so that rows are padded", "b c"]
TOKENS = 12


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2", "gpt_neox", "cohere"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp(request.param)
    models.save(request.param, folder)
    return load(str(folder))


@pytest.fixture(scope="module")
def probe(loaded: Loaded) -> HFEvaluator:
    return HFEvaluator(loaded, Steering(loaded.model, rows=6, rank=2), max_tokens=TOKENS)


@pytest.fixture(scope="module")
def candidates(loaded: Loaded) -> list[Candidate]:
    first, second = (models.direction(loaded.model, seed=seed, k=k) for seed, k in ((1, 1), (2, 2)))
    return [
        Candidate.of(first, "ablate", 1.0),
        Candidate.of(first, "add", -0.5),
        Candidate.of(second, "one_sided", 0.7),
        Candidate.of(first, "ablate", 0.0),
        Candidate.of(second, "affine", 1.0),
    ]


def crossed(steers: list[Any]) -> tuple[list[str], list[Any]]:
    """Prompts and steerings of all candidates, in rows that change candidate each time."""
    pairs = [(prompt, steer) for prompt in PROMPTS for steer in steers]
    return [prompt for prompt, _ in pairs], [steer for _, steer in pairs]


def test_rows_of_many_candidates_are_what_each_is_alone(probe: HFEvaluator, candidates: list[Candidate]) -> None:
    tokens = [ord("A") - 29, ord("z") - 29, 7]
    plain = probe.continuations(PROMPTS)
    with probe.resident(candidates) as steers:
        prompts, rows = crossed(steers)
        together = probe.answers(prompts, rows), probe.opening_odds(prompts, rows, tokens)
        plains = [one for one in plain for _ in steers]
        kls = probe.divergences(prompts, plains, rows)
    for number, one in enumerate(candidates):
        with probe.resident([one]) as (steer,):
            assert probe.answers(PROMPTS, steer) == together[0][number :: len(candidates)]
            assert probe.opening_odds(PROMPTS, steer, tokens) == pytest.approx(
                together[1][number :: len(candidates)], abs=1e-4
            )
            alone = probe.divergences(PROMPTS, plain, steer)
        for mine, other in zip(alone, kls[number :: len(candidates)], strict=True):
            assert mine == pytest.approx(other, abs=1e-5)
    assert max(row.max() for row in kls[3 :: len(candidates)]) < 1e-5, "no strength is plain"
    assert min(row.max() for row in kls[:: len(candidates)]) > 1e-4


def test_what_all_prompts_begin_with_is_run_once_for_each_candidate(
    loaded: Loaded, probe: HFEvaluator, candidates: list[Candidate]
) -> None:
    """With the same figures, and on models alone whose cache is all that they remember."""
    rendering = Rendering("A system prompt that all conversations begin with.")
    system = HFEvaluator(loaded, probe.steering, rendering, TOKENS)
    ids = [encode_all(loaded, [prompt], rendering)[0].ids for prompt in PROMPTS]
    seen: list[int] = []
    hook = loaded.model.get_input_embeddings().register_forward_hook(lambda *given: seen.append(given[1][0].numel()))

    def figures(steers: list[Any]) -> tuple[Any, ...]:
        plain = system.continuations(PROMPTS)
        prompts, rows = crossed(steers)
        kls = system.divergences(prompts, [one for one in plain for _ in steers], rows)
        return system.answers(prompts, rows), system.opening_odds(prompts, rows, [7]), kls

    try:
        some = [*candidates[:3], *(candidates[0].asking(tokens=each) for each in ("not-first", "last-30", "answer"))]
        with system.resident(some) as steers, pytest.MonkeyPatch.context() as patch:
            shared, few = figures(steers), sum(seen)
            seen.clear()
            patch.setattr("steer.lab.probe.whole_cache", lambda *_: False)
            alone, many = figures(steers), sum(seen)
    finally:
        hook.remove()
    assert shared[0] == alone[0]
    assert shared[1] == pytest.approx(alone[1], abs=1e-4)
    for mine, other in zip(shared[2], alone[2], strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
    assert min(map(len, ids)) > 20
    if whole_cache(loaded.model):
        assert few < 0.8 * many
    else:
        assert loaded.model.config.model_type in ("gemma2", "cohere")
        assert few == many


def saved(config: Any, folder: Path) -> Loaded:
    """A model of `config`, with weights large enough to tell tokens apart."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return load(str(folder))


JAMBA: dict[str, Any] = dict(num_experts=2, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False)
#: Models whose attention counts positions in the batch, and padding with them: by a bias, or in a window of which their
#: cache knows nothing.
COUNTING = {
    "mpt": lambda: tf.MptConfig(vocab_size=models.VOCABULARY, d_model=64, n_heads=4, n_layers=3, max_seq_len=512),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        window_size=8,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=512,
    ),
    "bloom": lambda: tf.BloomConfig(vocab_size=models.VOCABULARY, hidden_size=64, n_layer=3, n_head=4),
}


@pytest.mark.parametrize("kind", COUNTING)
def test_beside_what_all_prompts_begin_with_rows_of_any_length_are_what_each_is_alone(
    kind: str, tmp_path: Path
) -> None:
    loaded = saved(COUNTING[kind](), tmp_path)
    steering, rendering = Steering(loaded.model), Rendering("all begin so")
    many, one = (HFEvaluator(loaded, steering, rendering, TOKENS, batch_size) for batch_size in (None, 1))
    prompts = [*PROMPTS, "", "so long a prompt that others end before it goes on " * 2]
    begun = HFEvaluator._shared_prefix
    started_with: list[int] = []

    def counted(*given: Any) -> Any:
        started_with.append((found := begun(*given))[0])
        return found

    candidate = Candidate.of(models.direction(loaded.model), "ablate", 1.0)
    with many.resident([candidate]) as (steer,), pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFEvaluator, "_shared_prefix", counted)
        specs = [None, steer] * 3 + [None]
        assert many.answers(prompts, specs) == one.answers(prompts, specs)
        odds = (each.opening_odds(prompts, specs, [7, 40]) for each in (many, one))
        assert next(odds) == pytest.approx(next(odds), abs=1e-4)
    assert max(started_with) > 20


def dynamic() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return tf.LlamaConfig(**models._shape(rope_parameters=rope, max_position_embeddings=32))


@pytest.mark.parametrize("config", [longrope, dynamic])
def test_a_rotary_embedding_that_depends_on_the_longest_row_has_each_long_text_to_itself(
    config: Callable[[], Any], tmp_path: Path
) -> None:
    """The figures of all texts, in whatever order they come, are those of each alone, and answers are `generate`'s."""
    loaded = saved(config(), tmp_path)
    probe = HFEvaluator(loaded, Steering(loaded.model, rows=6, rank=2), max_tokens=TOKENS)
    test_plain_answers_are_those_of_generate(loaded, probe)
    candidate = Candidate.of(models.direction(loaded.model), "ablate", 1.0)
    test_rows_of_many_candidates_are_what_each_is_alone(probe, [candidate, *[candidate.asking(strength=0.0)] * 3])
    ids = [encode_all(loaded, [prompt])[0].ids for prompt in PROMPTS]
    plain = probe.continuations(PROMPTS)
    assert min(map(len, ids)) < 32 < max(map(len, ids))

    def figures(at: list[int]) -> list[Any]:
        prompts = [PROMPTS[i] for i in at]
        kls = probe.divergences(prompts, [plain[i] for i in at], None)
        said = probe.log_probabilities([ids[i] + plain[i].ids for i in at], None)
        return [probe.opening_odds(prompts, None, [7, 40]), *kls, *said]

    together = figures([3, 1, 0, 4, 2])
    for number, one in enumerate([3, 1, 0, 4, 2]):
        odds, kl, said = figures([one])
        assert odds[0] == pytest.approx(together[0][number], abs=1e-4)
        assert max(kl) < 1e-6
        assert max(together[1 + number]) < 1e-6
        assert said == pytest.approx(together[6 + number], abs=1e-4)


@pytest.mark.parametrize(("each", "tokens"), [(None, "answer"), (True, None), (True, "answer")])
def test_under_a_condition_a_prompt_is_what_it_is_without_or_plain(
    loaded: Loaded, probe: HFEvaluator, each: bool | None, tokens: str | None
) -> None:
    """As its last token's component says, or, where each token decides, as all of them say alike; in figures that read
    the answer too."""
    acting, asked = (models.direction(loaded.model, seed=seed) for seed in (1, 3))
    layers, opening = f"1-{len(probe.steering.anatomy.blocks) - 1}", [ord("A") - 29, 7]
    ids = [encode_all(loaded, [prompt], None)[0].ids for prompt in PROMPTS]
    last = torch.tensor([0.0] * len(PROMPTS), dtype=torch.float64)
    for at, prompt in enumerate(ids):
        with torch.no_grad():
            states = loaded.model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        last[at] = states[1][0, -1].double() @ asked.directions[0, 0].double()
    middle = float(last.sort().values[1:3].mean())
    met = [True] * len(PROMPTS) if each else [bool(value > middle) for value in last]
    condition = Condition("asked", 0, above=-1e30 if each else middle, each=each)
    under = Candidate(acting, Entry("", "", "ablate", 1.0, None, tokens, condition), asked)
    without = Candidate(acting, Entry("", "", "ablate", 1.0, layers, tokens))
    never = under.asking(condition=Condition("asked", 0, above=1e30, each=each))
    plain = probe.continuations(PROMPTS)
    taken = len(probe.steering.index.decisions._free)
    with probe.resident([under, without, never]) as steers:
        found = [
            (
                probe.answers(PROMPTS, steer),
                probe.opening_odds(PROMPTS, steer, opening),
                [float(row.max()) for row in probe.divergences(PROMPTS, plain, steer)],
            )
            for steer in (*steers, None)
        ]
    assert len(probe.steering.index.decisions._free) == taken, "every decision is given back"
    assert each or len(set(met)) == 2
    (mine, odds, kls), (theirs, their_odds, their_kls), off, (said, said_odds, said_kls) = found
    for at, meets in enumerate(met):
        assert mine[at] == (theirs if meets else said)[at]
        assert odds[at] == pytest.approx((their_odds if meets else said_odds)[at], abs=1e-4)
        assert kls[at] == pytest.approx((their_kls if meets else said_kls)[at], abs=1e-5)
    assert off[0] == said
    assert max(off[2]) < 1e-6
    assert max(their_kls) > 1e-4


@pytest.mark.parametrize(
    ("tokens", "span"),
    [
        ("prompt", lambda n: (0, n - 1)),
        ("answer", lambda n: (n - 1, n + TOKENS)),
        ("not-first", lambda n: (1, n + TOKENS)),
        ("first-7", lambda n: (0, min(n, 7))),
        ("last-3", lambda n: (n - 3, n)),
    ],
)
def test_tokens_of_a_row_are_those_of_its_own_prompt(
    probe: HFEvaluator, candidates: list[Candidate], tokens: str, span: Callable[[int], tuple[int, int]]
) -> None:
    """Laid by hand, each prompt alone, without a cache and without padding; beside rows that act elsewhere."""
    plain, model, steering = probe.continuations(PROMPTS), probe.loaded.model, probe.steering
    mine = candidates[0].asking(tokens=tokens)
    with probe.resident([mine, candidates[0], candidates[3]]) as (steer, everywhere, nothing):
        assert isinstance(everywhere, Spec)
        whole = steering.bank.steer(everywhere)

        def predicted(ids: list[int], start: int, stop: int) -> torch.Tensor:
            cuts = [min(start, len(ids)), min(stop, len(ids)), len(ids)]
            lengths = [cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1]]
            with steering.batch([None, whole, None], lengths), torch.inference_mode():
                return torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0].float(), -1)

        asked, rows = [*PROMPTS] * 3, [one for one in (everywhere, steer, nothing) for _ in PROMPTS]
        at = slice(len(PROMPTS), 2 * len(PROMPTS))
        answers = probe.answers(asked, rows)[at]
        odds = probe.opening_odds(asked, rows, [5, 40])[at]
        kls = probe.divergences(asked, plain * 3, rows)[at]
        for i, prompt in enumerate(PROMPTS):
            ids = encode_all(probe.loaded, [prompt])[0].ids
            bounds = span(len(ids))
            p = predicted(ids, *bounds)[-1].exp()[[5, 40]].sum()
            assert odds[i] == pytest.approx(float(torch.log(p) - torch.log1p(-p)), abs=1e-4)
            answer: list[int] = []
            while len(answer) < TOKENS:
                token = int(predicted(ids + answer, *bounds)[-1].argmax())
                if token in probe.loaded.eos_ids:
                    break
                answer.append(token)
            assert answers[i].ids == answer
            along = ids + plain[i].ids
            p, q = (each[len(ids) - 1 :] for each in (predicted(along, 0, 0), predicted(along, *bounds)))
            assert kls[i] == pytest.approx((p.exp() * (p - q)).sum(-1).numpy(), abs=1e-5)
        with pytest.raises(SpecError, match="not known where the prompt ends"):
            probe.log_probabilities([[1, 2, 3]], steer)


@pytest.mark.parametrize("tokens", PHASES)
def test_a_phase_of_a_row_is_that_of_its_own_answer(
    probe: HFEvaluator, candidates: list[Candidate], tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model whose thinking begins and ends with what it says in some of its answers; laid by hand, each token as
    the words of the docs say."""
    plain, model, steering = probe.continuations(PROMPTS), probe.loaded.model, probe.steering
    mine = candidates[0].asking(tokens=tokens)
    said = max((answer.ids for answer in plain), key=lambda ids: len(set(ids)))
    other = next((token for token in said[3:] if token != said[1]), None)
    unsaid = next(token for token in range(len(said) + 1) if token not in said)
    begin, end = (said[1], unsaid) if tokens == "thinking" else (unsaid, said[1])  # of a model that says one thing
    begin, end = (begin, end) if other is None else (said[1], other)
    thinking = Thinking(begin, end, frozenset())
    monkeypatch.setattr("steer.tokenization.thinking_of", lambda _: thinking)
    with probe.resident([mine, candidates[0]]) as (steer, everywhere):
        assert isinstance(steer, Spec)
        assert isinstance(everywhere, Spec)
        whole = steering.bank.steer(everywhere)

        def predicted(ids: list[int], prompt: int, steered: bool = True) -> tuple[torch.Tensor, bool]:
            acts = [steered and bool(acting(steer, prompt, at, ids, thinking)) for at in range(len(ids))]
            rows = [whole if act else None for act in acts]
            with steering.batch(rows, [1] * len(ids)), torch.inference_mode():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0].float()
            return torch.log_softmax(logits[prompt - 1 :], -1), any(acts)

        asked, rows = [*PROMPTS] * 3, [one for one in (everywhere, steer, None) for _ in PROMPTS]
        at = slice(len(PROMPTS), 2 * len(PROMPTS))
        answers = probe.answers(asked, rows)[at]
        odds = probe.opening_odds(asked, rows, [5, 40])[at]
        kls = probe.divergences(asked, plain * 3, rows)[at]
        came = set()
        for i, prompt in enumerate(PROMPTS):
            ids = encode_all(probe.loaded, [prompt])[0].ids
            p = predicted(ids, len(ids))[0][-1].exp()[[5, 40]].sum()
            assert odds[i] == pytest.approx(float(torch.log(p) - torch.log1p(-p)), abs=1e-4)
            answer: list[int] = []
            while len(answer) < TOKENS:
                token = int(predicted(ids + answer, len(ids))[0][-1].argmax())
                if token in probe.loaded.eos_ids:
                    break
                answer.append(token)
            assert answers[i].ids == answer
            along = ids + plain[i].ids
            (p, _), (q, acts) = predicted(along, len(ids), steered=False), predicted(along, len(ids))
            assert kls[i] == pytest.approx((p.exp() * (p - q)).sum(-1).numpy(), abs=1e-5)
            assert acts or max(kls[i]) < 1e-6
            came.add(acts)
    assert True in came
    monkeypatch.setattr("steer.tokenization.thinking_of", lambda _: None)
    with pytest.raises(SpecError, match="has tokens that begin and end a thinking"), probe.resident([mine]):
        pass


def test_layers_of_a_candidate_are_those_at_which_it_acts(probe: HFEvaluator, candidates: list[Candidate]) -> None:
    first = candidates[0]
    alone = replace(first.direction, weights=torch.tensor([0.0, 1.0, 0.0]))
    plain = probe.continuations(PROMPTS)
    with probe.resident([first.asking(layers="1"), replace(first, direction=alone)]) as steers:
        one, other = (probe.divergences(PROMPTS, plain, steer) for steer in steers)
    for mine, its in zip(one, other, strict=True):
        assert mine == pytest.approx(its, abs=1e-6)
    with pytest.raises(SpecError, match="the layers 0 to 2"), probe.resident([first.asking(layers="1-3")]):
        pass
    assert not probe.steering.bank.rows_in_use


def test_plain_answers_are_those_of_generate(loaded: Loaded, probe: HFEvaluator) -> None:
    for prompt, answer in zip(PROMPTS, probe.answers(PROMPTS, None), strict=True):
        ids = torch.tensor([encode_all(loaded, [prompt])[0].ids])
        out = loaded.model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=loaded.eos_ids)
        expected = out[0, ids.shape[1] :].tolist()
        assert answer.ids == [token for token in expected if token not in loaded.eos_ids]


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "bamba"])
def test_states_are_kept_for_the_rows_that_remain(kind: str, tmp_path: Path) -> None:
    """Rows end one after the other, and are padded in front."""
    for made in started(RECURRENT[kind]()):
        made.model.generation_config.eos_token_id = list(range(2, 128, 5))
        made.model.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    probe = HFEvaluator(loaded, Steering(loaded.model), max_tokens=TOKENS)
    test_plain_answers_are_those_of_generate(loaded, probe)
    test_opening_odds_are_those_of_the_whole_prediction(loaded, probe)
    assert len({len(answer.ids) for answer in probe.answers(PROMPTS, None)}) > 1
    candidate = Candidate.of(models.direction(loaded.model), "ablate", 1.0)
    test_rows_of_many_candidates_are_what_each_is_alone(probe, [candidate, candidate.asking(strength=0.0)])


def test_a_model_whose_padding_cannot_be_masked_is_refused(tmp_path: Path) -> None:
    config = tf.xLSTMConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_heads=4)
    tf.xLSTMForCausalLM(config).save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    with pytest.raises(UnsupportedModel, match="takes no attention_mask"):
        HFEvaluator(loaded, Steering(loaded.model))


def test_a_model_that_fails_in_batches_is_refused(tmp_path: Path) -> None:
    """transformers asks the cache of a Jamba without attention how long it is."""
    config = tf.JambaConfig(**models._shape("head_dim", attn_layer_period=9, attn_layer_offset=8, **JAMBA))
    loaded = saved(config, tmp_path)
    with pytest.raises(UnsupportedModel, match=r"JambaForCausalLM: a pass over a padded batch fails \(ValueError"):
        HFEvaluator(loaded, Steering(loaded.model))


def test_a_model_that_counts_its_padding_is_refused(tmp_path: Path) -> None:
    """TrOCR's positions are those of the batch, however little they say."""
    config = tf.TrOCRConfig(
        vocab_size=models.VOCABULARY, d_model=64, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=96
    )
    loaded = saved(config, tmp_path)
    with torch.no_grad():
        loaded.model.model.decoder.embed_positions.weight.mul_(0.1)
    with pytest.raises(UnsupportedModel, match="padding in front of a row changes its answer"):
        HFEvaluator(loaded, Steering(loaded.model))


def test_opening_odds_are_those_of_the_whole_prediction(loaded: Loaded, probe: HFEvaluator) -> None:
    tokens = [5, 40, 90]
    for prompt, odds in zip(PROMPTS, probe.opening_odds(PROMPTS, None, tokens), strict=True):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([encode_all(loaded, [prompt])[0].ids])).logits[0, -1].double()
        p = torch.softmax(logits, -1)[tokens].sum()
        assert odds == pytest.approx(float(torch.log(p) - torch.log1p(-p)), abs=1e-4)


def test_a_row_ends_where_its_answer_is_known(probe: HFEvaluator) -> None:
    whole = probe.answers(PROMPTS, None)
    seen: set[str] = set()

    def known(text: str) -> bool:
        seen.add(text)
        return len(text) >= 4

    for short, full in zip(probe.answers(PROMPTS, None, known=known), whole, strict=True):
        assert short.text == full.text[:4]
    assert max(map(len, seen)) == 4, "nothing was generated in vain"


def test_divergences_do_not_need_kept_predictions(
    probe: HFEvaluator, candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = probe.continuations(PROMPTS)
    monkeypatch.setattr("steer.lab.probe.KEPT_BYTES", 0)
    dropped = probe.continuations(PROMPTS)
    assert [one.logprobs is None for one in (*kept, *dropped)] == [False] * 5 + [True] * 5
    with probe.resident(candidates[:1]) as (steer,):
        for a, b in zip(*(probe.divergences(PROMPTS, plain, steer) for plain in (kept, dropped)), strict=True):
            assert a == pytest.approx(b, abs=1e-5)
        # along fewer tokens they are the same, as far as they go
        whole = probe.divergences(PROMPTS, kept, steer)
        for plain in (kept, dropped):
            for a, b in zip(whole, probe.divergences(PROMPTS, [one.first(3) for one in plain], steer), strict=True):
                assert len(b) == min(3, len(a))
                assert a[:3] == pytest.approx(b, abs=1e-5)


def test_the_size_of_the_cache_is_known(probe: HFEvaluator) -> None:
    """It says how many rows a batch may have: the more, the fewer steps."""
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.inference_mode(), probe.steering.batch([None]):
        cache: Any = last_logits(probe.loaded.model, ids, torch.ones_like(ids))[1]
    kept = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kept == 5 * cache_bytes(probe.steering)


def test_candidates_share_rows_and_leave_none_behind(
    loaded: Loaded, probe: HFEvaluator, candidates: list[Candidate]
) -> None:
    assert probe.room == 6
    with probe.resident(candidates):
        assert probe.room == 3
    many = [Candidate.of(models.direction(loaded.model, seed=seed), "ablate", 1.0) for seed in range(7)]
    with pytest.raises(NoRoom), probe.resident(many):
        pass
    limited = candidates[0].direction.with_meta(modes=("ablate",))
    with pytest.raises(SpecError, match="its modes: ablate"), probe.resident([Candidate.of(limited, "add", 1.0)]):
        pass
    assert probe.room == 6


def test_first_tokens_are_those_of_the_openings(tiny_folder: Path) -> None:
    tokenizer = load(str(tiny_folder)).tokenizer
    assert first_tokens(tokenizer, ["I'm sorry", "Sorry"]) == sorted(3 + ord(letter) - 32 for letter in "IS")
    with pytest.raises(InvalidInput, match="no tokens for none"):
        first_tokens(tokenizer, [])


WORDS = st.lists(st.sampled_from(["I'm", "sorry,", "I", "can't", "cannot", "help", "as an AI", "so", "I can", "."]))
LONG = Behaviour(name="long", description="long", min_words=4)
BOTH = Behaviour(name="both", description="both", min_words=3, patterns=(r"\bso\b",))


@pytest.mark.parametrize("behaviour", [REFUSAL, LONG, BOTH], ids=lambda b: b.name)
@given(words=WORDS, more=st.text(alphabet="aI' .t", max_size=200), cut=st.integers(0, 60))
def test_what_is_decided_stays_so(behaviour: Behaviour, words: list[str], more: str, cut: int) -> None:
    answer = " ".join(words)[:cut]
    if behaviour.decided(answer):
        assert behaviour.shown(answer + more) == behaviour.shown(answer)


def test_what_shows_it_is_decided_in_its_first_words_where_nothing_can_take_it_back() -> None:
    assert not REFUSAL.decided("I'm sorry, but I can't see it now")
    assert REFUSAL.model_copy(update={"exceptions": ()}).decided("I'm sorry, but I can't see it now")
    assert not REFUSAL.decided("x" * 160), "a late refusal may follow"
    assert REFUSAL.model_copy(update={"late": ()}).decided("x" * 160)
    assert REFUSAL.decided("I cannot do that. " + "x" * 160)
    assert not REFUSAL.decided("Sure! First get")
    assert LONG.decided("one two three four five")
    assert not LONG.decided("one two three four")


def test_divergence_is_the_textbook_sum(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder))
    direction = models.direction(loaded.model)
    probe = HFEvaluator(loaded, Steering(loaded.model), max_tokens=5)
    prompts = ["abc", "hello world"]
    plain = probe.answers(prompts, None)
    with probe.resident([Candidate.of(direction, "ablate", 1.0)]) as (steer,):
        got = DivergenceOf.of("ablate", "harmless", probe.divergences(prompts, plain, steer))
        expected, first = [], []
        for prompt, answer in zip(prompts, plain, strict=True):
            head = loaded.chat_ids([{"role": "user", "content": prompt}])
            ids = torch.tensor([head + answer.ids])
            with torch.no_grad():
                p = loaded.model(input_ids=ids).logits[0].double().softmax(-1)
                with probe.steering.batch([steer]):
                    q = loaded.model(input_ids=ids).logits[0].double().softmax(-1)
            kl = (p * (p / q).log()).sum(-1)[len(head) - 1 :]
            expected.append(float(kl.mean()))
            first.append(float(kl[0]))
    assert got.mean == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert got.first_mean == pytest.approx(sum(first) / 2, rel=1e-3)


def test_log_probabilities_are_those_of_one_sequence_alone(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder))
    probe = HFEvaluator(loaded, Steering(loaded.model))
    sequences = [loaded.text_ids(text) for text in ("hello world", "ab", "a longer text than the others")]
    with probe.resident([Candidate.of(models.direction(loaded.model), "ablate", 1.0)]) as (steer,):
        together = probe.log_probabilities(sequences, steer)
        for ids, row in zip(sequences, together, strict=True):
            with torch.no_grad(), probe.steering.batch([steer]):
                logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].double()
            alone = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert row == pytest.approx(alone.numpy(), abs=1e-4)
    assert probe.log_probabilities(sequences[:1], None)[0] != pytest.approx(together[0], abs=1e-3)


class WithoutChoice(tf.LlamaForCausalLM):
    """Of the models whose `forward` cannot be asked for some of its logits, and takes any keyword all the same."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, past_key_values: Any = None, **more: Any
    ) -> Any:
        more.pop("logits_to_keep", None)
        given = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        return super().forward(input_ids=input_ids, **given, **more)


def test_divergences_of_a_model_that_gives_all_its_logits(tmp_path: Path) -> None:
    models.save("llama", tmp_path)
    loaded = load(str(tmp_path))
    candidate = Candidate(models.direction(loaded.model, seed=1), Entry("", "", "ablate", 0.7, tokens="first-3"))
    found = []
    for kind in (type(loaded.model), WithoutChoice):
        loaded.model.__class__ = kind
        probe = HFEvaluator(loaded, Steering(loaded.model, rows=6, rank=2), max_tokens=TOKENS)
        with probe.resident([candidate]) as (steer,):
            found.append(probe.divergences(PROMPTS, probe.continuations(PROMPTS), steer))
        probe.steering.detach()
    assert all(row.max() > 1e-6 for row in found[0])
    for one, other in zip(*found, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-7)


def test_a_model_without_a_cache_in_what_it_returns_says_so() -> None:
    class Forgetting:
        def forward(self, input_ids: Any, attention_mask: Any, past_key_values: Any, use_cache: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(1, 1, 4))

        __call__ = forward

    with pytest.raises(UnsupportedModel, match="returns no past_key_values"):
        last_logits(Forgetting(), torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))


def test_a_divergence_is_exact_where_it_is_small_and_a_token_that_neither_has_adds_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50_000, dtype=torch.float64) * 3
    moved = logits + 1e-4 * torch.randn_like(logits)
    p, q = logits.log_softmax(-1), moved.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    assert exact.max() < 1e-7
    assert torch.allclose(kl_divergence(p.float(), q.float()), exact, rtol=1e-2, atol=0)
    assert torch.equal(kl_divergence(p, p), torch.zeros(3, dtype=torch.float64))
    masked = torch.zeros(50_000, dtype=torch.bool)
    masked[::3] = True
    p, q = (t.masked_fill(masked, -torch.inf).float().log_softmax(-1) for t in (logits, moved))
    assert kl_divergence(p, q).isfinite().all()
    assert kl_divergence(logits.log_softmax(-1), q).isinf().all(), "q does not have what p has"
