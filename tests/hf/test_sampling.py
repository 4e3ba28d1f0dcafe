"""Sampling: what may be drawn, how often, and that nobody's draw depends on the neighbours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
import transformers as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer.errors import RequestFailed
from steer.hf.sampling import Sampler, Sampling, Token, report, sample, shaped

law = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**63)


def logits_of(seed: int, requests: int, vocabulary: int = 40, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(requests, vocabulary, generator=generator)


def chosen(logits: Tensor, samplers: Sequence[Sampler]) -> list[Token]:
    tokens = sample(logits, samplers)
    return [token for token in tokens if isinstance(token, Token) or pytest.fail(str(token))]


def ids(logits: Tensor, *samplings: Sampling) -> list[int]:
    return [token.id for token in chosen(logits, [Sampler(s) for s in samplings])]


def of(
    temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, seed: int | None = None
) -> Sampling:
    return Sampling(1, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)


def kept(logits: Tensor, s: Sampling, slack: float = 0.0) -> set[int]:
    """The tokens that may be drawn from one row: temperature, top-k, top-p of what is left, min-p. In float64.

    `slack` widens every limit, for tokens that stand on it.
    """
    probs = torch.softmax(logits.double() / s.temperature, -1)
    order = sorted(range(len(probs)), key=lambda i: -float(probs[i]))[: s.top_k or None]
    total = sum(float(probs[i]) for i in order)
    out, before = set(), 0.0
    for i in order:
        if before < (s.top_p + slack) * total and float(probs[i]) >= (s.min_p - slack) * float(probs[order[0]]):
            out.add(i)
        before += float(probs[i])
    return out | {order[0]}


@pytest.mark.parametrize(
    "sampling",
    [of(temperature=0), of(top_k=1), of(top_p=1e-6), of(min_p=1.0), of(temperature=0, top_k=5, top_p=0.5, seed=3)],
    ids=["temperature 0", "top_k 1", "top_p tiny", "min_p 1", "temperature 0 with a seed"],
)
def test_each_way_to_be_greedy_is_the_argmax(sampling: Sampling) -> None:
    logits = logits_of(0, 20)
    assert ids(logits, *[sampling] * 20) == logits.argmax(-1).tolist()


@given(SEEDS, st.floats(1e-300, 1e-4))
@example(0, 1e-300)
@example(0, 1e-46)
@example(0, 1e-40)
@law
def test_a_temperature_near_0_is_greedy(seed: int, temperature: float) -> None:
    logits = logits_of(seed, 3)
    best = logits.topk(2).values
    logits[best[:, 0] - best[:, 1] < 0.01] = torch.arange(40.0)
    assert ids(logits, *[of(temperature)] * 3) == logits.argmax(-1).tolist()


LIMITS = st.builds(
    of,
    temperature=st.floats(0.1, 2.0),
    top_p=st.just(1.0) | st.floats(0.05, 1.0),
    top_k=st.just(0) | st.integers(1, 60),
    min_p=st.just(0.0) | st.floats(0.0, 1.0),
    seed=st.none() | st.integers(-(2**70), 2**70),
)


@given(SEEDS, st.lists(LIMITS, min_size=1, max_size=6))
@law
def test_what_is_drawn_is_within_the_limits(seed: int, samplings: list[Sampling]) -> None:
    logits = logits_of(seed, len(samplings))
    samplers = [Sampler(s) for s in samplings]
    for _ in range(5):
        for row, sampling, token in zip(logits, samplings, chosen(logits, samplers), strict=True):
            assert token.id in kept(row, sampling, slack=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        of(),
        of(top_k=3),
        of(top_k=100),
        of(top_p=0.7),
        of(min_p=0.3),
        of(top_k=6, top_p=0.8),
        of(temperature=2.0, top_p=0.9, min_p=0.2),
    ],
    ids=str,
)
def test_everything_within_the_limits_is_drawn_as_often_as_it_is_likely(sampling: Sampling) -> None:
    """Chi-square over 20000 draws, at a limit that a right sampler passes all but once in a million."""
    torch.manual_seed(0)
    row = torch.tensor([1.9, 0.2, 1.1, -0.5, 1.5, 0.6, -0.2, 0.9])
    n = 20_000
    allowed = sorted(kept(row, sampling))
    drawn = Counter(ids(row.expand(n, -1), *[sampling] * n))
    assert drawn.keys() <= set(allowed)
    probs = torch.softmax(row.double()[allowed] / sampling.temperature, -1)
    chi = sum((drawn[i] - n * p) ** 2 / (n * p) for i, p in zip(allowed, probs.tolist(), strict=True))
    freedom = len(allowed) - 1
    assert chi < freedom + 7 * math.sqrt(2 * freedom) + 14


def test_seeded_draws_are_as_likely_as_unseeded_ones() -> None:
    row = torch.tensor([1.0, 0.0, 2.0])
    n = 6000
    drawn = Counter(ids(row.expand(n, -1), *[of(seed=i) for i in range(n)]))
    for i, p in enumerate(torch.softmax(row, -1).tolist()):
        assert abs(drawn[i] / n - p) < 5 * math.sqrt(p * (1 - p) / n)


@given(SEEDS, st.lists(LIMITS, min_size=1, max_size=5), st.integers(0, 2**64))
@law
def test_a_seeded_draw_does_not_depend_on_its_neighbours(seed: int, others: list[Sampling], own: int) -> None:
    mine = of(temperature=0.9, top_p=0.95, seed=own)
    steps = [logits_of(seed + step, len(others) + 1) for step in range(4)]
    alone = Sampler(mine)
    expected = [chosen(logits[:1], [alone])[0].id for logits in steps]
    first = [Sampler(s) for s in (mine, *others)]
    assert [chosen(logits, first)[0].id for logits in steps] == expected
    last = [Sampler(s) for s in (*others, mine)]
    assert [chosen(logits.roll(-1, 0), last)[-1].id for logits in steps] == expected


def test_a_seed_gives_the_same_draws_again_and_another_seed_others() -> None:
    logits = torch.zeros(1, 1000)

    def draws(seed: int) -> list[int]:
        sampler = Sampler(of(seed=seed))
        return [chosen(logits, [sampler])[0].id for _ in range(8)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert len(set(draws(1))) > 1, "each step draws anew"


def test_a_mixed_batch_gives_each_row_its_own_parameters() -> None:
    logits = logits_of(4, 4)
    logits[3, 7] = 100.0
    got = ids(logits, of(temperature=0), of(top_k=1), of(seed=1), of())
    assert got[:2] == logits[:2].argmax(-1).tolist()
    assert got[2] == ids(logits[2:3], of(seed=1))[0]
    assert got[3] == 7


def test_tokens_that_are_masked_are_never_drawn() -> None:
    logits = torch.full((500, 20), -torch.inf)
    logits[:, [3, 11]] = 0.0
    assert set(ids(logits, *[of(temperature=2.0)] * 500)) == {3, 11}


def check_report(token: Token, row: Tensor, top: int) -> None:
    logprobs = torch.log_softmax(row.double(), -1)
    assert token.logprob == pytest.approx(float(logprobs[token.id]), abs=1e-5)
    assert len(token.top) == top
    assert [value for _, value in token.top] == sorted((value for _, value in token.top), reverse=True)
    for (i, value), best in zip(token.top, logprobs.topk(top).values.tolist(), strict=True):
        assert value == pytest.approx(float(logprobs[i]), abs=1e-5)
        assert value == pytest.approx(best, abs=1e-5)
    assert len({i for i, _ in token.top}) == top


@given(SEEDS, st.lists(st.none() | st.integers(0, 20), min_size=1, max_size=6), st.floats(0, 2))
@law
def test_logprobs_are_the_models_own_whatever_the_sampling(
    seed: int, tops: list[int | None], temperature: float
) -> None:
    logits = logits_of(seed, len(tops))
    before = logits.clone()
    samplers = [Sampler(Sampling(1, temperature=temperature, top_k=3, logprobs=top)) for top in tops]
    for row, top, token in zip(logits, tops, chosen(logits, samplers), strict=True):
        if top is None:
            assert (token.logprob, token.top) == (None, ())
        else:
            check_report(token, row, top)
    assert torch.equal(logits, before), "the caller's logits are left alone"


@given(SEEDS, st.lists(st.integers(0, 10), min_size=1, max_size=5))
@law
def test_a_report_scores_given_tokens(seed: int, tops: Sequence[int]) -> None:
    logits = logits_of(seed, len(tops)).bfloat16()
    given_ids = torch.arange(len(tops)) * 7
    for row, i, top, token in zip(logits, given_ids.tolist(), tops, report(logits, given_ids, tops), strict=True):
        assert token.id == i
        check_report(token, row, top)


ANY_NUMBER = st.integers() | st.sampled_from([10**400, -(10**400), 2**63, 2**31]) | st.floats()
ANYTHING = st.builds(
    Sampling,
    max_tokens=st.just(1),
    temperature=ANY_NUMBER,
    top_p=ANY_NUMBER,
    top_k=ANY_NUMBER,
    min_p=ANY_NUMBER,
    seed=st.none() | st.integers(),
    logprobs=st.none() | st.integers(0, 2**40),
)
BROKEN = st.sampled_from([math.nan, math.inf, -math.inf])


@given(SEEDS, st.lists(ANYTHING | st.none(), min_size=1, max_size=4), BROKEN)
@example(0, [Sampling(1, top_k=10**400)], math.nan)
@example(0, [Sampling(1, top_k=10**400, seed=5), Sampling(1, logprobs=4000, seed=7), None], math.nan)
@law
def test_no_value_and_no_logits_of_one_request_reach_another(
    seed: int, others: list[Sampling | None], broken: float
) -> None:
    """None stands for a request with good parameters whose logits are all NaN, or infinite."""
    mine = [of(temperature=0.9, top_k=9, seed=3), Sampling(1, temperature=0.0, logprobs=2)]
    logits = logits_of(seed, len(others) + 2)
    for i, other in enumerate(others, 1):
        if other is None:
            logits[i] = broken
    asked = [Sampler(other or of(seed=1)) for other in others]
    got = sample(logits, [Sampler(mine[0]), *asked, Sampler(mine[1])])
    assert [got[0], got[-1]] == chosen(logits[[0, -1]], [Sampler(one) for one in mine])
    for other, token in zip(others, got[1:-1], strict=True):
        assert isinstance(token, RequestFailed) or (other is not None and 0 <= token.id < logits.shape[1])


EOS = 5
TOKENS = st.integers(0, 39)
SHAPES = st.builds(
    Sampling,
    max_tokens=st.just(9),
    temperature=st.just(0.0),
    logprobs=st.just(0),
    logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=3).map(lambda d: tuple(sorted(d.items()))),
    bad_words=st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    repetition_penalty=st.just(1.0) | st.floats(0.5, 2.0),
    frequency_penalty=st.just(0.0) | st.floats(-2, 2),
    presence_penalty=st.just(0.0) | st.floats(-2, 2),
    min_tokens=st.integers(0, 6),
)


def as_generate_has_it(row: Tensor, shape: Sampling, prompt: list[int], answer: list[int]) -> Tensor:
    """By transformers' own processors, and by OpenAI's formula for the two penalties that those have not."""
    whole, made = torch.tensor([prompt + answer]), torch.tensor([answer], dtype=torch.long)
    scores = row[None].clone()
    if shape.logit_bias:
        scores = tf.SequenceBiasLogitsProcessor({(token,): bias for token, bias in shape.logit_bias})(whole, scores)
    if words := [list(word) for word in shape.bad_words if len(word) <= len(answer) + 1]:
        scores = tf.NoBadWordsLogitsProcessor(words)(made, scores)
    if shape.repetition_penalty != 1:
        scores = tf.RepetitionPenaltyLogitsProcessor(shape.repetition_penalty)(whole, scores)
    counts = torch.bincount(made[0], minlength=len(row))
    scores = scores - shape.frequency_penalty * counts - shape.presence_penalty * (counts > 0)
    if shape.min_tokens:
        scores = tf.MinNewTokensLengthLogitsProcessor(len(prompt), shape.min_tokens, [EOS])(whole, scores)
    return scores[0]


@given(SEEDS, st.lists(st.tuples(SHAPES, st.lists(TOKENS, min_size=1, max_size=6)), min_size=1, max_size=4))
@law
def test_what_changes_logits_is_transformers_own_for_each_request(
    seed: int, asked: list[tuple[Sampling, list[int]]]
) -> None:
    samplers = [Sampler(s, prompt, [EOS]) for s, prompt in asked]
    answers: list[list[int]] = [[] for _ in asked]
    for step in range(8):
        logits = logits_of(seed + step, len(asked) + 1, scale=5.0)
        before = logits.clone()
        tokens = sample(logits, [*samplers, Sampler(Sampling(1, temperature=0))])
        for row, (shape, prompt), answer, token in zip(logits, asked, answers, tokens, strict=False):
            assert isinstance(token, Token)
            expected = as_generate_has_it(row, shape, prompt, answer)
            assert float(expected[token.id]) == pytest.approx(float(expected.max()), abs=1e-4)
            check_report(token, row, 0)  # which is the model's own, whatever was changed
            answer.append(token.id)
        assert isinstance(tokens[-1], Token)
        assert tokens[-1].id == int(logits[-1].argmax()), "a neighbour that asks for nothing"
        assert torch.equal(logits, before)


def test_what_nobody_asks_for_makes_no_copy() -> None:
    logits = logits_of(0, 2)
    assert shaped(logits, [Sampler(of())] * 2) is logits


def test_ends_are_the_models_and_the_requests_own() -> None:
    assert Sampling(1, stop_token_ids=(7,)).ends([2, 3]) == {2, 3, 7}
    assert Sampling(1, stop_token_ids=(7,), ignore_eos=True).ends([2, 3]) == {7}
