"""Whose stream was lost, and whose blocks hold what was computed of it: without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer.runtime.token_index import Decision, Losses
from steer.shared import Shared
from steer.spec import Entry, Spec
from steer.vllm import frontend
from steer.vllm.frontend import GROUPS, SALT, Frontend, Salts, Ticket, parted, salt
from steer.vllm.internals.base import ABOVE, news_of
from steer.vllm.internals.worker import prompt_of
from steer.vllm.losses import KEPT, SteeredRun, SteeredRuns, Step
from steer.vllm.settings import RESOLVED

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=8)


def run_of(prompt: list[int], spec: str = "a") -> SteeredRun:
    return SteeredRun(spec, prompt, len(prompt))


def step(requests: dict[str, int], lost: list[int], starts: dict[str, int], decided: Mapping[int, bool] = {}) -> Step:
    """A pass in which each request has so many tokens, of which `lost` are, and some have decided."""
    flags = torch.zeros(sum(requests.values()), dtype=torch.bool)
    flags[lost] = True
    cached = SimpleNamespace(req_ids=list(starts), num_computed_tokens=list(starts.values()))
    scheduled: Any = SimpleNamespace(scheduled_cached_reqs=cached, scheduled_new_reqs=[])
    opened = torch.zeros_like(flags)
    opened[[at for at, holds in decided.items() if holds]] = True
    losses = Losses(flags, None, opened, [(Decision(1), at) for at in decided])
    return Step(losses, list(requests), np.array(list(requests.values()), np.int32), scheduled)


def output(*requests: str) -> Any:
    return SimpleNamespace(req_id_to_index={r: i for i, r in enumerate(requests)}, num_nans_in_logits=None)


def told(made: Any) -> dict[str, int | None]:
    """Positions of first lost tokens."""
    return {request: news_of(value)[0] for request, value in (made.num_nans_in_logits or {}).items()}


@given(TOKENS, TOKENS, st.integers(0, 7), st.booleans(), st.booleans())
def test_who_has_the_tokens_up_to_a_lost_one_and_the_same_steering_falls_with_it(
    first: list[int], second: list[int], position: int, same: bool, later: bool
) -> None:
    position %= len(first)
    runs, other = SteeredRuns(), run_of(second, "a" if same else "b")
    runs.meet("x", run_of(first))
    if not later:
        runs.meet("y", other)
    made = runs.annotate(output("x", "y"), step({"x": len(first)}, [position], {"x": 0}))
    if later:
        runs.end("x")
        runs.meet("y", other)
        made = runs.annotate(output("y"), None)
    falls = same and second[: position + 1] == first[: position + 1]
    assert told(made) == ({"x": position} if not later else {}) | ({"y": position} if falls else {})


def test_another_embedding_or_image_is_another_prompt() -> None:
    """Their token ids are the same, or there are none; and a loss is remembered for longer than its request."""

    def asking(embeds: torch.Tensor | None = None, image: str = "", ids: list[int] | None = None) -> Any:
        place = SimpleNamespace(offset=1, length=2)
        features = [SimpleNamespace(identifier=image, mm_position=place)] if image else []
        return SimpleNamespace(prompt_token_ids=ids, prompt_embeds=embeds, mm_features=features)

    def falls(first: Any, second: Any) -> bool:
        one, other = (SteeredRun("a", prompt_of(new), 4) for new in (first, second))
        one.lost = 2
        return other.falls_with(one)

    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    after, before = rows.clone(), rows.clone()
    after[3], before[1] = 0, 0
    ids = [1, 5, 5, 2]
    for mixed in (None, ids):
        assert [falls(asking(rows, ids=mixed), asking(each, ids=mixed)) for each in (rows, after, before)] == [
            True,
            True,
            False,
        ]
    assert not falls(asking(rows), asking(ids=ids))
    assert not falls(asking(rows, ids=ids), asking(rows, ids=[2, *ids[1:]]))
    assert falls(asking(ids=ids, image="cat"), asking(ids=ids, image="cat"))
    assert not falls(asking(ids=ids, image="cat"), asking(ids=ids, image="dog"))


def test_a_loss_is_told_with_each_output_until_its_request_ends() -> None:
    runs = SteeredRuns()
    for name in "xy":
        runs.meet(name, run_of([1, 2, 3] if name == "x" else [2, 2, 3]))
    runs.annotate(output(), step({"x": 2, "y": 2}, [3], {"x": 0, "y": 40}))  # a part of a prompt has no output
    assert told(runs.annotate(output("x", "y"), step({"x": 1, "y": 1}, [], {"x": 2, "y": 42}))) == {"y": 41}
    runs.end("y")
    whole = output("x", "y")
    assert runs.annotate(whole, None) is whole


def test_what_a_plain_request_and_one_that_has_ended_say_is_nobodys() -> None:
    runs = SteeredRuns()
    assert told(runs.annotate(output("p"), step({"p": 3}, [1], {"p": 0}))) == {}


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([None, False, True]), st.booleans()), min_size=1))
def test_what_is_decided_in_a_pass_is_told_with_its_output_beside_losses_and_what_vllm_counts(
    each: list[tuple[int, bool | None, bool]],
) -> None:
    """Each request has so many tokens, by the last of which it decides, or which is lost; vLLM has counted of each."""
    runs, lengths, counted = SteeredRuns(), {str(i): n for i, (n, _, _) in enumerate(each)}, output()
    for name, n in lengths.items():
        runs.meet(name, run_of([int(name)] * n))
        counted.req_id_to_index[name], counted.num_nans_in_logits = int(name), dict.fromkeys(lengths, 7)
    last = dict(zip((np.cumsum([*lengths.values()]) - 1).tolist(), each, strict=True))
    lost = [at for at, (*_, fell) in last.items() if fell]
    decided = {at: holds for at, (_, holds, _) in last.items() if holds is not None}
    found = runs.annotate(counted, step(lengths, lost, lengths, decided)).num_nans_in_logits
    assert {value & (2**ABOVE - 1) for value in found.values()} == {7}
    for name, (n, holds, fell) in zip(lengths, each, strict=True):
        assert news_of(found[name]) == (2 * n - 1 if fell else None, holds)


def test_losses_that_are_remembered_are_bounded() -> None:
    runs = SteeredRuns()
    for n in range(KEPT + 1):
        runs.meet(str(n), run_of([n, 1]))
        runs.annotate(output(), step({str(n): 2}, [0], {str(n): 0}))
        runs.end(str(n))
    for n, falls in ((0, False), (1, True)):
        runs.meet("again", run_of([n, 1]))
        assert bool(told(runs.annotate(output("again"), None))) == falls
        runs.end("again")


def test_no_ending_of_a_salt_comes_again() -> None:
    salts, seen = Salts(Shared()), {"s"}
    assert salts.current("s") == "s"
    for n in range(2 * GROUPS + 2):
        salts.renew("s" if n % 2 else f"other {n}")
        if n % 2:
            assert salts.current("s") not in seen
            seen.add(salts.current("s"))
    assert Salts(Shared(), "x").current("s") != "s"


def test_however_many_salts_are_lost_the_table_of_the_front_ends_has_room() -> None:
    shared = Shared()
    salts, before = Salts(shared), shared._count
    for n in range(10 * GROUPS):
        salts.renew(f"salt {n}")
    assert shared._count - before <= GROUPS


def test_a_loss_parts_the_prompt_that_was_lost_from_later_ones_and_no_other_of_its_ticket() -> None:
    """A ticket has a request for each prompt, and the salt may depend on how long a prompt is."""
    spec = Spec((Entry("d", "d" * 64, "ablate", 1.0, tokens="prompt"),))
    admission: Any = SimpleNamespace(spec=spec, readout=None, hold=lambda key: None, release=lambda key: None)
    front = object.__new__(Frontend)
    front.held, front.salts = {}, Salts(Shared())

    def held(request_id: str, prompt: int, ticket: Ticket) -> str:
        request: Any = SimpleNamespace(
            request_id=request_id,
            cache_salt=None,
            prompt_token_ids=[0] * prompt,
            prompt_embeds=None,
            mm_features=None,
            sampling_params=SimpleNamespace(extra_args={RESOLVED: spec.receipt()}),
        )
        front._hold(request, frontend._Call(ticket))
        return str(request.cache_salt)

    ticket, later = Ticket(admission), Ticket(admission)
    before = [held("a", 40, ticket), held("b", 50, ticket)]
    front.lost("a")
    after = [held("c", 40, later), held("d", 50, later)]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_a_salt_is_parted_for_requests_alone_that_a_front_end_has_steered() -> None:
    """A request that was not cannot have its own salt taken away by what it looks like, and cannot end an engine."""
    spec = Spec((Entry("a", "0" * 64, "ablate", 1.0, None, "answer"),))
    whole = f"mine{salt(spec, 40)}"
    steered: Any = SimpleNamespace(
        cache_salt=whole, sampling_params=SimpleNamespace(extra_args={RESOLVED: spec.receipt()})
    )
    assert parted(steered) == ("mine", 39, whole.removeprefix("mine"))
    for looks in (whole, f"{SALT}x", f"{SALT}99999:", SALT, "", None):
        for extra in (None, {}, {"other": 1}):
            plain: Any = SimpleNamespace(cache_salt=looks, sampling_params=SimpleNamespace(extra_args=extra))
            assert parted(plain) == (looks or "", 0, "")
    odd: Any = SimpleNamespace(cache_salt=f"{SALT}x", sampling_params=steered.sampling_params)
    assert parted(odd) == (f"{SALT}x", 0, "")


def test_no_token_of_an_image_is_plain_where_one_is_steered() -> None:
    """In some models they see each other, the later ones too."""
    spec = Spec((Entry("a", "0" * 64, "ablate", 1.0, None, "last-50"),))
    assert salt(spec, 200).startswith(f"{SALT}150:")
    assert salt(spec, 200, [(3, 5), (20, 140), (170, 10)]).startswith(f"{SALT}20:")
    assert salt(spec, 200, [(20, 130), (150, 10)]).startswith(f"{SALT}150:")


def test_a_loss_that_one_front_end_has_seen_holds_for_all(tmp_path: Path) -> None:
    first, second = (Salts(Shared(tmp_path / "met", index, 2)) for index in (0, 1))
    seen = [second.current("s")]
    for _ in range(3):
        first.renew("s")
        assert first.current("s") == second.current("s") not in seen
        seen.append(second.current("s"))
