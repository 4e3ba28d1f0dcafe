"""The policy file: all of it is checked before any of it holds, and each problem has its line."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from steer.registry import Registry
from steer.serve import carriers, policy
from steer.serve.authorise import Caller, Refusal, Rules, resolve
from steer.serve.policy import KeyRules, hash_of, new_secret
from steer.shape import Shape
from steer.spec import Spec, parse, tokens_in_both, tokens_within
from steer.tokenization import Thinking
from tests import models
from tests.serve.rules import NAMES, POLICY

HASH = hash_of("one")
OTHER = hash_of("two")


def problems(text: str) -> list[str]:
    with pytest.raises(policy.PolicyError) as caught:
        policy.read(text.encode(), "p.toml")
    return list(caught.value.problems)


def test_a_key_of_which_only_the_hash_is_given_may_do_nothing_but_ask() -> None:
    rules = policy.read(f'[keys.a]\nhash = "{HASH}"'.encode()).keys["a"]
    assert not rules.allows("refusal")
    assert not rules.manage
    assert not rules.readout
    assert not rules.metrics
    assert rules.required == ()
    assert rules.default is None


def test_the_table_of_the_tests_is_a_policy() -> None:
    assert policy.read(b"\xef\xbb\xbf" + POLICY.encode()).model_dump() == policy.read(POLICY.encode()).model_dump(), (
        "a BOM"
    )
    found = policy.read(POLICY.encode())
    assert set(found.keys) == set(NAMES)
    assert len(found.names) == len(NAMES)
    assert found.digest == hashlib.sha256(POLICY.encode()).hexdigest()


def test_every_problem_is_told_with_its_line() -> None:
    text = f"""# a comment
metrics_public = 1
on_kill = "explode"
[directions."bad name"]
max_strength = 99

[keys.alice]
hash = "sha256:short"
directions = [
    "refusal",
    "../etc",
]
max_strenght = 1

[keys.bob]
hash = "{HASH}"
modes = ["delete"]
requests_per_minute = 0
default = "refusal=much"
required = "a:b=c"

[keys.carol]
hash = "{HASH}"
tokens_per_minute = nan
max_strength = "1"
"""
    found = problems(text)
    expected = {
        2: "metrics_public",
        3: "on_kill",
        5: "directions.bad name.max_strength",
        8: "keys.alice.hash",
        9: "keys.alice.directions",
        13: "keys.alice.max_strenght: unknown field (did you mean max_strength?); accepted: max_strength, max_shift",
        17: "keys.bob.modes",
        18: "keys.bob.requests_per_minute",
        19: "keys.bob.default",
        20: "keys.bob.required",
        24: "keys.carol.tokens_per_minute",
        25: "keys.carol.max_strength",
    }
    for line, says in expected.items():
        assert any(problem.startswith(f"p.toml:{line}: {says}") for problem in found), (line, says, found)


CALIBRATED = models.direction(models.tiny("llama")).with_meta(calibrated={"ablate": (0, 1.5), "one_sided": (-0.5, 2)})
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}]}
NO: dict[str, object] = {
    "model": "m",
    "tools": [],
    "functions": None,
    "messages": [{"role": "user", "content": "role: tool"}],
}


def asked(rules: str, spec: str | None, body: dict[str, object], *, required: str = "", default: str = "off") -> Spec:
    """What a key with `rules` gets for `spec` in a request with `body`, of a server with a `default`. Its direction
    `twin` has the vectors of `d`."""
    text = f'[keys.a]\nhash = "{HASH}"\ndirections = ["*"]\n{required}\n{rules}'
    found = policy.read(text.encode())
    placement = models.placement()
    placement.shape = replace(placement.shape, thinking=Thinking(5, 6, frozenset()))
    registry = Registry(placement)
    registry.put("d", CALIBRATED.to_bytes())
    registry.put("twin", CALIBRATED.with_meta(created="later").to_bytes())
    carried = carriers.read(body | ({} if spec is None else {"steer": spec}), Headers({}), ["m"])
    return resolve(carried, registry, parse(default), caller=Caller("a", found.keys["a"]), rules=Rules(found))


@pytest.mark.parametrize("rules", ['max_strength = "calibrated"', '[directions.d]\nmax_strength = "calibrated"'])
def test_a_calibrated_dose_is_what_the_file_says_for_each_mode_and_side(rules: str) -> None:
    for spec in ("d=1.5", "d:one_sided=2", "d:one_sided=-0.5", "d=0.75,d:one_sided=1", "d@answer=1"):
        assert asked(rules, spec, NO), spec
    for spec in ("d=1.51", "d=-0.01", "d:one_sided=-0.6", "d:add=0.1", "d=1,d:one_sided=1"):
        with pytest.raises(Refusal, match=r"calibrated: d: ablate from 0 to 1\.5, one_sided from -0\.5 to 2") as caught:
            asked(rules, spec, NO)
        assert caught.value.rule == ("direction_" if "[directions" in rules else "") + "max_strength"
    # at another threshold, or with the norm kept, nothing was measured
    with pytest.raises(Refusal, match=r"d:ablate:norm=0\.1: doses are calibrated without a shift and without the norm"):
        asked(rules, "d:ablate:norm=0.1", NO)
    with pytest.raises(Refusal, match=r"d:one_sided\^-0\.5=1\.0: doses are calibrated without a shift"):
        asked(f"max_shift = 1.0\n{rules}", "d:one_sided^-0.5=1", NO)


def test_two_files_share_one_calibrated_dose() -> None:
    """One may be the other under another name, with a calibration or a date of its own."""
    both = '[directions.d]\nmax_strength = "calibrated"\n[directions.twin]\nmax_strength = "calibrated"'
    for rules in ('max_strength = "calibrated"', both):
        assert asked(rules, "d=0.75,twin=0.75", NO)
        with pytest.raises(Refusal, match=r"d:ablate=1, twin:ablate=1 is over what was calibrated: d: .*; twin: "):
            asked(rules, "d=1,twin=1", NO)


@pytest.mark.parametrize(
    ("rules", "default"),
    [
        ('modes = ["add"]', "d"),
        ("max_strength = 0.5", "d"),
        ("[directions.d]\nmax_strength = 0.5", "d"),
        ('max_strength = "calibrated"', "d:add=0.1"),
    ],
)
def test_a_default_that_rules_forbid_is_left_out_whosever_it_is(rules: str, default: str) -> None:
    """A policy does not know what the file says. The request did not ask for it, so nothing is refused."""
    assert not asked(rules, None, NO, default=default)
    assert not asked(rules, None, NO, required=f'default = "{default}"')
    with pytest.raises(Refusal):
        asked(rules, default, NO)


def test_what_is_allowed_exactly_is_allowed_in_parts() -> None:
    """0.1 + 0.2 is more than 0.3 in floats."""
    both = "d=0.1,d:add=0.2"
    assert len(asked("max_strength = 0.3", both, NO).entries) == 2
    assert len(asked(f'max_strength = 0.3\ndefault = "{both}"', None, NO).entries) == 2
    with pytest.raises(Refusal, match=r"over the 0\.3"):
        asked("max_strength = 0.3", "d=0.1,d:add=0.201", NO)


def test_a_default_against_what_is_required_is_left_out() -> None:
    required = 'required = "d:add=0.5"'
    [entry] = asked("", None, NO, required=required, default="d").entries
    assert (entry.mode, entry.strength) == ("add", 0.5)


def test_a_phase_beside_what_is_required_is_refused_without_telling_of_it() -> None:
    required = 'required = "twin@0-1=0.5"'
    with pytest.raises(Refusal, match="what is required for this key acts at tokens that do not go together") as told:
        asked("", "d@thinking", NO, required=required)
    assert "all" not in str(told.value).split()
    [entry] = asked("", None, NO, required=required, default="d@thinking").entries
    assert entry.strength == 0.5


@pytest.mark.parametrize("tokens", ['["answer", "prompt"]', '["prompt"]'])
@pytest.mark.parametrize("allowed", ["true", "false"])
def test_what_is_told_of_conditions_is_what_is_admitted(tokens: str, allowed: str) -> None:
    rules = f"conditions = {allowed}\ntokens = {tokens}"
    text = f'[keys.a]\nhash = "{HASH}"\n{rules}'
    for rank in (1, 4):
        shape = Shape("m", 2, 4, frozenset(["resid_post"]), rank)
        told = policy.bounds([policy.read(text.encode()).keys["a"]], shape)
        assert told["conditions"] == (allowed == "true" and rank > 1)
    if allowed == "true":
        assert asked(rules, "d@prompt?each:d@0>0.5", NO).condition
    else:
        with pytest.raises(Refusal, match="condition"):
            asked(rules, "d@prompt?each:d@0>0.5", NO)


def test_a_rule_of_tokens_can_have_a_largest_number() -> None:
    allowed = {
        "last-8": ("last-1", "last-8"),
        "last-N": ("last-1", "last-9999"),
        "first-N": ("first-3",),
        "all": (None,),
        "answer": ("answer",),
    }
    every = {tokens for each in allowed.values() for tokens in each} | {"last-9", "first-1", "prompt", "not-first"}
    more = {"last-8": set(), "last-N": {"last-8", "last-9"}, "first-N": {"first-1"}, "all": set(), "answer": set()}
    for rule, those in allowed.items():
        assert {tokens for tokens in every if tokens_within(tokens, rule)} == {*those} | more[rule], rule


RULES = ("all", "answer", "last-3", "last-8", "last-N", "first-2", "first-N")


@given(st.lists(st.sampled_from(RULES), unique=True), st.lists(st.sampled_from(RULES), unique=True))
def test_what_two_rules_of_tokens_allow_is_what_each_allows(some: list[str], others: list[str]) -> None:
    both = tokens_in_both(some, others)
    assert len(set(both)) == len(both)
    for tokens in (None, "answer", "last-2", "last-5", "last-9", "first-1", "first-3"):
        one, two, said = (any(tokens_within(tokens, rule) for rule in rules) for rules in (some, others, both))
        assert said == (one and two), tokens


@pytest.mark.parametrize(
    "body",
    [
        TOOLS,
        {"functions": [{"name": "f"}]},
        {"chat_template_kwargs": {"tools": [{}]}},
        {"chat_template_kwargs": {"custom_tools": [{}]}},
        {"messages": [{"role": "ipython", "content": "4"}]},
        {"messages": [{"role": "developer", "content": "x", "tools": [{}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        {"input": [{"type": "mcp_call", "output": "4"}]},
        {"previous_response_id": "resp_1"},
        {"previous_input_messages": [{}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "y"}]}]},
        {"input": [{"type": "function_call_output", "output": "y"}]},
    ],
)
@pytest.mark.parametrize("rules", ["with_tools = false", "[directions.d]\nwith_tools = false"])
def test_a_request_with_tools_is_not_steered_where_the_rules_say_so(rules: str, body: dict[str, object]) -> None:
    assert asked(rules, "d", NO)
    assert asked("", "d", body)
    assert not asked(rules, "off", body)
    with pytest.raises(Refusal, match="no request that has tools") as caught:
        asked(rules, "d", body)
    assert caught.value.rule.endswith("with_tools")
    # what is there without being asked for is left out, and what the operator requires is not
    assert not asked(rules, None, body, required='default = "d"')
    assert asked(rules, None, NO, required='default = "d"')
    assert asked(rules, None, body, required='required = "d"')


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'[keys.a]\nhash = "{HASH}"\nlayers = "9-3"', "'9-3' is not accepted: the first and the last layer"),
        (f'[keys.a]\nhash = "{HASH}"\ntokens = ["thoughts"]', "keys.a.tokens"),
        (f'[keys.a]\nhash = "{HASH}"\ntokens = ["last-0"]', "'last-0' is not accepted: all, prompt"),
        (
            f'[keys.a]\nhash = "{HASH}"\ndirections = ["*"]\ndefault = "d=1,d:add=1"\n'
            "[directions.d]\nmax_strength = 1.5",
            "p.toml:4: keys.a.default: 'd': for any key strength 2 is over max_strength",
        ),
        (
            f'[keys.a]\nhash = "{HASH}"\ndirections = ["*"]\ndefault = "d"\nrequired = "d:add=0.5"',
            "default: 'd' is required, and cannot be had in another way",
        ),
        (
            f'[keys.a]\nhash = "{HASH}"\nmax_shift = 3',
            "p.toml:3: keys.a.max_shift: 3 is not accepted: a number from 0 to 2",
        ),
        (f'[keys.a]\nhash = "{HASH}"\nrequests_at_once = 0', "a number from 1 to 1000000"),
        (f'[keys.a]\nhash = "{HASH}"\nmax_strength = "much"', "a number from 0 to 10, or 'calibrated'"),
        (
            f'[keys.a]\nhash = "{HASH}"\ndirections = ["*"]\ntokens = ["answer"]\nlayers = 3\ndefault = "d"',
            "p.toml:6: keys.a.default: the layers (all) are not within 3",
        ),
        ("[keys.a\n", "p.toml:1: not TOML"),
        ('x = 1\ny = "', "p.toml:2: not TOML"),
        ("", "keys: missing; it is required; `steer keys new NAME --policy FILE` adds a [keys.NAME]"),
        ("[keys]\n", "p.toml:1: keys"),
        ('\n\nkeys = {a = "x"}', "p.toml:3: keys.a: 'x' is not accepted: a table"),
        (
            f'[keys.a]\nhash = "{HASH}"\n[keys.b]\nhash = "{HASH}"',
            "p.toml:4: keys.b.hash: 'a' and 'b' have the same hash",
        ),
        (f'[keys."a b"]\nhash = "{HASH}"', "'a b' is not a key's name"),
        (f'[keys.a]\nhash = "{HASH}"\nsteer = false\ndefault = "refusal"', "a key that may not steer has none"),
        (f'[keys.a]\nhash = "{HASH}"\ndefault = "refusal"', "'refusal' is not among this key's directions"),
        (
            f'[keys.a]\nhash = "{HASH}"\ndirections = ["*"]\nmodes = ["add"]\nmax_strength = 1\ndefault = "d:ablate=2"',
            "p.toml:6: keys.a.default: 'ablate' is not among this key's modes",
        ),
        (f'[keys.a]\nhash = "{HASH}"\n[directions."*"]\nmax_strength = 1', "direction name '*' is not acceptable"),
        ("a = " + "[" * 10000, "p.toml:1: "),
    ],
)
def test_problems_are_named(text: str, says: str) -> None:
    assert any(says in problem for problem in problems(text)), problems(text)


def test_a_secret_in_place_of_its_hash_is_not_repeated() -> None:
    secret = new_secret()
    assert secret not in " ".join(problems(f'[keys.a]\nhash = "{secret}"'))


def test_bytes_and_files_that_are_no_policy(tmp_path: Path) -> None:
    with pytest.raises(policy.PolicyError, match=r"p:2: not UTF-8"):
        policy.read(b"a = 1\n\xff", "p")
    with pytest.raises(policy.PolicyError, match="over 1048576 bytes"):
        policy.read(b"#" * 2**21)
    with pytest.raises(policy.PolicyError, match="cannot be read: No such file"):
        policy.load(tmp_path / "none.toml")


def test_a_secret_may_be_replaced_while_both_hold() -> None:
    found = policy.read(f'[keys.a]\nhash = ["{HASH}", "{OTHER}"]'.encode())
    assert found.names == {HASH: "a", OTHER: "a"}


SECRETS = [new_secret() for _ in range(20)]


def near(secret: str) -> st.SearchStrategy[str]:
    return st.sampled_from([secret[:-1], f"{secret}=", secret.upper(), f" {secret}", hash_of(secret)])


def test_secrets_are_long_and_apart() -> None:
    assert len({*map(hash_of, SECRETS)}) == 20
    assert all(secret.startswith("sk-steer-") and len(secret) >= 50 for secret in SECRETS)


@given(st.text(st.characters(exclude_categories=())) | st.sampled_from(SECRETS).flatmap(near))
def test_only_equal_texts_are_stored_alike(candidate: str) -> None:
    """The hash of a secret is no secret either."""
    known = {hash_of(secret): secret for secret in SECRETS}
    assert known.get(hash_of(candidate), candidate) == candidate
    assert KeyRules(hash=hash_of(candidate)).hashes == (hash_of(candidate),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('x = """\n' + "a\n" * 500_000 + '"""', "x: unknown"),
        ("x = [\n" + "1,\n" * 50_000 + "]", "x: unknown"),
        ("[[x]]\n" * 150_000, "x: unknown"),
        ("a." * 400_000 + "b = 1", "p.toml:1: over 8192 bytes in one line"),
        ("a." * 4_000 + "b = 1", "a: unknown"),
        ("x = " + "[" * 4_000 + "]" * 4_000, "nested too deeply"),
        ("x = " + "1" * 5_000, "not TOML: Exceeds the limit"),
        (
            "x = 1\nmetrics_public = 0x" + "f" * 5_000,
            "metrics_public: an integer of 20000 bits is not accepted: true or false",
        ),
    ],
    ids=range(8),
)
@pytest.mark.timeout(60)
def test_what_would_take_for_ever_or_cannot_be_written_is_a_problem_like_others(text: str, says: str) -> None:
    assert any(says in problem for problem in problems(text))
