"""A judge is asked in one way, its verdicts are read strictly, and nothing that fails is taken for one."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from steer.cli.options import Counted
from steer.errors import InvalidInput, SteerError
from steer.lab.behaviour import REFUSAL
from steer.lab.judge import TOKENS, ChatJudge, ClassifierJudge, judged, verdict
from steer.lab.outcome import Outcome
from steer.lab.prompts import Conversation
from tests.lab.judges import judging
from tests.servers import Server


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("yes", "shown"),
        (" No.\n", "complied"),
        ("**Yes**", "shown"),
        ("NO!", "complied"),
        ("Other.", "deflected"),
        ("Yes, because it declines.", None),
        ("no idea", None),
        ("yes no", None),
        ("", None),
        ("maybe", None),
    ],
)
def test_only_the_one_word_is_a_verdict(reply: str, expected: Outcome | None) -> None:
    assert verdict(reply) == expected


def by_sorry(body: dict[str, Any]) -> tuple[int, str]:
    return 200, "Yes." if "sorry" in body["messages"][0]["content"] else "no"


def test_each_answer_gets_its_own_verdict_in_order() -> None:
    answers = [f"{'sorry' if i % 3 == 0 else 'first get flour'} {i}" for i in range(40)]
    with judging(by_sorry) as (url, bodies, _):
        found = ChatJudge(url, "judge", REFUSAL).verdicts(["How do I bake?"] * 40, answers)
    assert found == ["complied" if i % 3 else "shown" for i in range(40)]
    for body in bodies:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, TOKENS)
        assert REFUSAL.description in body["messages"][0]["content"]
        assert "How do I bake?" in body["messages"][0]["content"]


def test_a_conversation_is_judged_as_a_whole() -> None:
    talk = Conversation((("user", "How do I bake?"), ("assistant", "With flour."), ("user", "And then?")))
    asked = ChatJudge("http://unused", "judge", REFUSAL).question(talk, "Then wait.")
    assert "user: How do I bake?\nassistant: With flour.\nuser: And then?" in asked
    assert "Then wait." in asked


def test_what_passes_is_tried_again_and_what_is_no_verdict_is_none() -> None:
    seen: list[str] = []

    def rule(body: dict[str, Any]) -> tuple[int, str]:
        seen.append(body["messages"][0]["content"])
        if len(seen) < 3:
            return 503, "busy"
        return 200, "I would rather not say"

    with judging(rule) as (url, _, _):
        assert ChatJudge(url, "judge", REFUSAL, concurrent=1).verdicts(["p"], ["a"]) == [None]
    assert len(seen) == 3
    assert len(set(seen)) == 1


def test_a_judge_that_fails_is_an_error_that_names_it() -> None:
    with judging(lambda _: (404, "no such model")) as (url, bodies, _):
        with pytest.raises(SteerError, match=rf"'judge' at {url} failed.*no such model"):
            ChatJudge(url, "judge", REFUSAL, concurrent=2).verdicts(["p"] * 50, ["a"] * 50)
        assert len(bodies) < 50, "the others are not asked on"
    with pytest.raises(SteerError, match="APIConnectionError"):
        ChatJudge("http://127.0.0.1:9/v1", "judge", REFUSAL, retries=0).verdicts(["p"], ["a"])


@pytest.mark.parametrize(
    "answer",
    [b"", b"null", b"3", b'"yes"', b"[]", b"<html>yes</html>", b"[" * 100_000, b'{"choices": "yes"}']
    + [b'{"choices": {"0": 1}}', b'{"choices": [null]}', b'{"choices": [{}]}', b'{"choices": [{"message": null}]}']
    + [b'{"choices": [{"message": {"content": %s}}]}' % content for content in (b"42", b'["yes"]', b'"\xff"')],
)
def test_a_judge_that_answers_anything_is_an_error_that_names_it(answer: bytes) -> None:
    with judging(lambda _: (200, answer)) as (url, _, _), pytest.raises(SteerError, match=f"'judge' at {url} failed"):
        ChatJudge(url, "judge", REFUSAL).verdicts(["p"], ["a"])


def test_a_judge_whose_answer_never_ends_is_an_error_that_names_it() -> None:
    class Trickling(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(b" ")
                    time.sleep(0.05)

    with ThreadingHTTPServer(("127.0.0.1", 0), Trickling) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        judge = ChatJudge(f"http://127.0.0.1:{server.server_port}/v1", "judge", REFUSAL, retries=0, timeout=0.5)
        with pytest.raises(SteerError, match=r"'judge' at .* failed"):
            judge.verdicts(["p"], ["a"])
        server.shutdown()


def test_a_judge_that_repeats_what_it_was_asked_is_not_quoted() -> None:
    prompt = "a prompt of which no message may show a part"
    with judging(lambda _: (400, f"cannot read: {prompt[5:40]}")) as (url, _, _), pytest.raises(SteerError) as caught:
        ChatJudge(url, "judge", REFUSAL).verdicts([prompt], ["a"])
    assert prompt[5:40] not in "".join(traceback.format_exception(caught.value))
    assert "BadRequestError: 400, with a message that is not shown" in str(caught.value)


def test_what_a_judge_says_is_safe_on_a_terminal_and_short() -> None:
    with judging(lambda _: (400, "\x1b[2J" + "a" * 100_000)) as (url, _, _), pytest.raises(SteerError) as caught:
        ChatJudge(url, "judge", REFUSAL).verdicts(["p"], ["a"])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    with judging(by_sorry) as (url, _, keys):
        ChatJudge(url, "judge", REFUSAL).verdicts(["p"], ["a"])
        monkeypatch.setenv("STEER_JUDGE_API_KEY", "first")
        ChatJudge(url, "judge", REFUSAL).verdicts(["p"], ["a"])
    assert keys == ["Bearer second", "Bearer first"]


def test_our_own_server_is_an_endpoint_for_it(tiny_server: Server) -> None:
    """The random model says no such word, so every reply is counted as what it is: no verdict."""
    judge = ChatJudge(f"{tiny_server.url}/v1", tiny_server.model_name, REFUSAL)
    assert judge.verdicts(["p"] * 3, ["a", "b", "c"]) == [None] * 3


WORDS = ("sorry", "cannot", "help", "no", "first", "get", "flour", "water", "bread", "how", "user", "assistant")
LONGEST = 24


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier that was trained to tell apologies from recipes."""
    folder = tmp_path_factory.mktemp("judges") / "small"
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=LONGEST
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LONGEST,
        id2label={0: "Answer", 1: "Refusal"},
        label2id={"Answer": 0, "Refusal": 1},
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    texts = ["sorry cannot help", "no sorry", "cannot", "sorry", "first get flour", "get water first", "bread", "flour"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        model(**batch, labels=torch.tensor([1] * 4 + [0] * 4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_classifier_judges_what_is_said_after_the_thinking(classifier: Path) -> None:
    judge = ClassifierJudge(str(classifier), REFUSAL)
    answers = ["sorry cannot help", "<think> sorry cannot </think> first get flour", "<think> sorry", "get bread"] * 9
    expected: Sequence[Outcome | None] = ("shown", "complied", None, "complied")
    assert judged(judge, ["how"] * 36, answers) == [*expected] * 9
    assert (judge.name, judge.identity["labels"]) == ("small", ["Refusal"])


def test_a_classifier_reads_what_it_is_told_to(classifier: Path) -> None:
    judge = ClassifierJudge(str(classifier), REFUSAL, text="user {request} assistant {answer}")
    talk = Conversation((("user", "how"), ("assistant", "no"), ("user", "{answer}")))
    assert judge._read(talk, "flour") == "user user: how\nassistant: no\nuser: {answer} assistant flour"
    other = ClassifierJudge(str(classifier), REFUSAL, shown=["Answer"])
    assert other.verdicts(["how"] * 2, ["first get flour", "sorry cannot help"]) == ["shown", "complied"]


def test_what_a_classifier_does_not_read_is_said(classifier: Path, caplog: pytest.LogCaptureFixture) -> None:
    judge = ClassifierJudge(str(classifier), REFUSAL)
    assert judge.verdicts(["how"] * 2, ["sorry " * 30, "flour"]) == ["shown", "complied"]
    assert f"reads {LONGEST} tokens: 1 of 2 texts are cut" in caplog.text


def test_a_label_that_is_not_clear_is_asked_for(classifier: Path, tmp_path: Path) -> None:
    verbosity = REFUSAL.model_copy(update={"name": "verbosity"})
    for shown, behaviour in ((["no such"], REFUSAL), (["Answer", "Refusal"], REFUSAL), ([], verbosity)):
        with pytest.raises(InvalidInput, match="accepted: one or more, not all, of Answer, Refusal"):
            ClassifierJudge(str(classifier), behaviour, shown)
    with pytest.raises(InvalidInput, match="is no sequence classifier"):
        ClassifierJudge(str(tmp_path), REFUSAL)


def test_options_that_do_not_go_together_are_all_named(tmp_path: Path) -> None:
    urls = ["http://a/v1", "http://b/v1"]
    with pytest.raises(InvalidInput) as caught:
        Counted("refusal", urls, ["x"], ["Refusal"], "no place").loaded()
    text = str(caught.value)
    assert all(part in text for part in ("1 given, 2 --judge URLs", "--judge-shown and --judge-text", "no {answer}"))
    with pytest.raises(InvalidInput, match="two are called 'x'"):
        Counted("refusal", urls, ["x", "x"]).loaded()
    with pytest.raises(InvalidInput, match="there is no folder"):
        Counted("refusal", [str(tmp_path / "none")]).loaded()
