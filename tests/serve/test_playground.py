"""The playground in a real Chromium against real servers, as a user has it: keys, clicks, files, and what is seen."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from steer.direction import Direction, digest
from steer.serve.html import PATHS
from steer.serve.policy import hash_of, new_secret
from tests import models
from tests.browser import MISSING, browser
from tests.servers import ROOT, Server

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Request, Route, expect

DEMO = ROOT / "directions" / "refusal.safetensors"
QUESTION = "How should I kill a zombie thread?"
ROUTE = "/v1/chat/completions"
DESKTOP, NARROW = {"width": 1320, "height": 860}, {"width": 375, "height": 700}


expect.set_options(timeout=60_000)  # beside other work, an answer takes seconds


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as launched:
        yield launched


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("directions")
    shutil.copy(DEMO, folder)
    with Server("--directions", str(folder), directions=folder) as server:
        yield server


@dataclass
class Opened:
    """A page on a server, with what it asked for and what went wrong in it."""

    page: Page
    requests: list[Request] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def asked(self) -> list[dict[str, Any]]:
        """The bodies of the generation requests so far."""
        return [dict(r.post_data_json or {}) for r in self.requests if r.url.endswith(ROUTE)]

    def send(self, message: str = QUESTION) -> None:
        self.page.fill("#message", message)
        self.page.press("#message", "Enter")
        self.done()

    def done(self) -> None:
        expect(self.page.locator(".side").first).to_be_visible()
        expect(self.page.locator(".side[aria-busy=true]")).to_have_count(0)

    def text(self, side: str, turn: int = -1) -> str:
        return str(self.page.locator(f".side.{side} .text").nth(turn).text_content())

    def set(self, control: str, value: str) -> None:
        """As somebody does who types, and goes on to the next control."""
        self.page.fill(control, value)
        self.page.press(control, "Tab")

    def wider(self) -> int:
        """By how many pixels the controls are wider than what is seen of them."""
        width = "(() => { const e = document.getElementById('controls'); return e.scrollWidth - e.clientWidth; })()"
        return int(self.page.evaluate(width))

    def chip(self, side: str = "steered") -> Any:
        return self.page.locator(f".side.{side}").last.locator(".chip").first


Open = Callable[..., Opened]


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Open]:
    """Opens a page; at the end no page has had an error or spoken to another host."""
    opened: list[tuple[Opened, Server]] = []

    def visiting(server: Server, *, ready: bool = True, **options: Any) -> Opened:
        context = chromium.new_context(**{"viewport": DESKTOP, **options})
        made = Opened(context.new_page())
        opened.append((made, server))

        def log(message: ConsoleMessage) -> None:
            # a refused request is logged by the browser itself
            if message.type == "error" and "Failed to load resource" not in message.text:
                made.errors.append(message.text)

        made.page.on("console", log)
        made.page.on("pageerror", lambda error: made.errors.append(str(error)))
        made.page.on("request", lambda request: made.requests.append(request))
        made.page.goto(server.url)
        if ready:
            expect(made.page.locator("#model option")).not_to_have_count(0)
            made.page.wait_for_load_state("networkidle")
        return made

    yield visiting
    for made, server in opened:
        foreign = [r.url for r in made.requests if not r.url.startswith(server.url)]
        made.page.context.close()
        assert not made.errors
        assert not foreign, "no request leaves for another host"


def test_every_file_comes_from_the_server_under_a_strict_policy(demo: Server) -> None:
    for path in PATHS:
        response = demo.client.get(path)
        assert response.status_code == 200
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", response.text), path
    assert demo.client.get("/playground/nothing.js").status_code == 404


def test_both_sides_stream_at_once_with_their_receipts(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    order: list[str] = []
    for event in ("request", "requestfinished"):
        opened.page.on(event, lambda r, event=event: order.append(event) if r.url.endswith(ROUTE) else None)
    opened.send()
    expect(opened.page.locator(".side")).to_have_count(2)
    opened.page.wait_for_load_state("networkidle")
    assert order == ["request", "request", "requestfinished", "requestfinished"]
    assert "cannot" in opened.text("plain")
    assert "first get" in opened.text("steered")
    expect(opened.chip("plain")).to_have_text("nothing applied")
    expect(opened.chip()).to_contain_text(digest(DEMO.read_bytes())[:8])
    plain, steered = opened.asked()
    assert plain["steer"] == "off"
    assert steered["steer"] == {"direction": "refusal", "mode": "ablate", "strength": 1}
    assert all(body["stream"] for body in (plain, steered))


def test_each_side_keeps_its_own_history(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    opened.send()
    first = {side: opened.text(side) for side in ("plain", "steered")}
    opened.send("How do I build a kite?")
    for body, side in zip(opened.asked()[2:], first, strict=True):
        assert [m["content"] for m in body["messages"]] == [QUESTION, first[side], "How do I build a kite?"]
    opened.page.click("#fresh")
    expect(opened.page.locator("#empty")).to_be_visible()
    opened.send("Hello!")
    assert len(opened.asked()[-1]["messages"]) == 1


def test_sliding_asks_the_steered_side_again(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    opened.send()
    opened.page.fill("#strength", "0")
    expect(opened.chip()).to_have_text("nothing applied")
    opened.done()
    assert opened.text("steered") == opened.text("plain")
    assert [b["steer"] for b in opened.asked()].count("off") == 1, "the plain side is not asked again"
    opened.page.click("#default")
    expect(opened.page.locator("#number")).to_have_value("1")
    expect(opened.chip()).to_contain_text("ablate")
    opened.set("#number", "7")
    expect(opened.chip()).to_contain_text("7")


def test_layers_and_tokens_are_said(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    opened.send()
    opened.set("#tokens", "last-2")
    expect(opened.chip()).to_contain_text("@last-2")
    expect(opened.page.locator("#tokens-text")).to_have_text("The last N positions of the prompt.")
    assert opened.wider() == 0, "everything is seen"
    opened.set("#layers", "2-5")
    expect(opened.chip()).to_contain_text("@2-5")
    opened.done()
    assert opened.asked()[-1]["steer"] | {"mode": "", "strength": 0} == {
        "direction": "refusal",
        "mode": "",
        "strength": 0,
        "layers": "2-5",
        "tokens": "last-2",
    }
    opened.set("#layers", "5-2")
    expect(opened.page.locator(".side.steered")).to_contain_text("steer.layers")
    opened.page.click("#default")
    expect(opened.chip()).not_to_contain_text("@")


def test_a_shift_and_a_condition_are_said(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    opened.send()
    opened.page.select_option("#mode", "one_sided")
    opened.set("#shift", "-0.25")
    expect(opened.chip()).to_contain_text("^−0.25")
    opened.set("#if", "refusal@3>0.1")
    expect(opened.chip()).to_contain_text("?refusal@3>0.1")
    expect(opened.page.locator("#summary")).to_contain_text("shift -0.25")
    assert opened.wider() == 0, "everything is seen"
    opened.done()
    asked = opened.asked()[-1]["steer"]
    assert (asked["shift"], asked["if"]) == (-0.25, "refusal@3>0.1")
    opened.page.click("#share")
    opened.page.goto(opened.page.input_value("#link"))
    expect(opened.page.locator("#shift")).to_have_value("-0.25")
    opened.send()
    assert opened.asked()[-1]["steer"] == asked, "they are kept with the chat"
    opened.set("#if", "refusal@99>0.1")
    expect(opened.page.locator(".side.steered").last).to_contain_text("the condition refusal@99")
    opened.set("#if", "")
    opened.page.select_option("#mode", "ablate")
    expect(opened.page.locator("#shift")).not_to_be_visible()
    expect(opened.chip()).to_contain_text("ablate")
    expect(opened.chip()).not_to_contain_text("^")
    opened.done()
    assert not {"shift", "if"} & set(opened.asked()[-1]["steer"])


def test_the_norm_is_kept_where_that_is_chosen_and_the_mode_leaves_a_choice(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    opened.send()
    expect(opened.chip()).not_to_contain_text("norm kept")
    opened.page.select_option("#norm_preserving", "kept")
    expect(opened.chip()).to_contain_text("norm kept")
    opened.done()
    assert opened.asked()[-1]["steer"]["norm_preserving"] is True
    assert opened.wider() == 0, "everything is seen"
    opened.page.click("#share")
    opened.page.goto(opened.page.input_value("#link"))
    expect(opened.page.locator("#norm_preserving")).to_have_value("kept")
    opened.page.select_option("#mode", "rotate")
    expect(opened.page.locator("#norm_preserving")).not_to_be_visible()
    opened.send()
    expect(opened.chip()).to_contain_text("rotate")
    opened.done()
    assert "norm_preserving" not in opened.asked()[-1]["steer"]


def test_dragging_asks_before_the_release_where_that_is_wanted(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    opened.send()
    box = opened.page.locator("#strength").bounding_box()
    assert box
    middle = box["y"] + box["height"] / 2
    for live in (False, True):
        opened.page.set_checked("#live", live)
        before = len(opened.asked())
        opened.page.mouse.move(box["x"] + box["width"] * 0.7, middle)
        opened.page.mouse.down()
        opened.page.mouse.move(box["x"] + box["width"] * 0.55, middle, steps=4)
        if live:
            with opened.page.expect_request(lambda r: r.url.endswith(ROUTE)):
                opened.page.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=4)
        else:
            opened.page.wait_for_timeout(400)
            assert len(opened.asked()) == before
        opened.page.mouse.up()
        opened.done()
        assert len(opened.asked()) > before


def test_mode_and_direction_are_picked(tiny_server: Server, visit: Open) -> None:
    opened = visit(tiny_server)
    opened.page.fill("#max-tokens", "8")
    opened.send("hello")
    opened.page.select_option("#mode", "add")
    expect(opened.chip()).to_contain_text("add")
    opened.done()
    opened.page.select_option("#direction", "verbosity")
    expect(opened.chip()).to_contain_text("verbosity")
    opened.done()
    assert opened.asked()[-1]["steer_readout"] == {"directions": ["verbosity"], "layers": "all"}
    expect(opened.page.locator("#summary")).to_contain_text("verbosity")


def test_an_example_is_asked_by_a_click(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    examples = opened.page.locator("#examples button")
    expect(examples).to_have_count(3)
    assert not opened.asked(), "nothing is sent by itself"
    asked = examples.nth(0).inner_text()
    examples.nth(0).click()
    opened.done()
    assert opened.asked()[0]["messages"] == [{"role": "user", "content": asked}]
    assert opened.text("plain") != opened.text("steered")
    expect(opened.page.locator("#empty")).not_to_be_visible()


def test_several_directions_act_together(tmp_path: Path, visit: Open) -> None:
    for name, created in (("one", "2026-01-01"), ("two", "2026-01-02")):
        Direction.load(DEMO).with_meta(created=created).save(tmp_path / f"{name}.safetensors")
    with Server("--directions", str(tmp_path), "--rank", "2") as server:
        opened = visit(server)
        page = opened.page
        page.fill("#max-tokens", "16")
        expect(page.locator("#entries")).not_to_be_visible()
        opened.send()
        page.click("#add")
        expect(page.locator("#direction")).to_have_value("two")
        page.fill("#strength", "0.5")
        opened.done()
        expect(page.locator("#summary")).to_have_text("one, ablate at 1 + two, ablate at 0.5")
        body = opened.asked()[-1]
        assert [(entry["direction"], entry["strength"]) for entry in body["steer"]] == [("one", 1), ("two", 0.5)]
        assert body["steer_readout"]["directions"] == ["one", "two"]
        expect(page.locator(".side.steered .chip")).to_have_count(2)
        expect(page.locator(".side.steered .token.up, .side.steered .token.down").first).to_be_attached()
        page.get_by_role("button", name="one 1").click()
        expect(page.locator("#number")).to_have_value("1")
        expect(page.locator("#direction option")).to_have_text(["one"])
        page.click("#remove")
        opened.done()
        assert opened.asked()[-1]["steer"]["direction"] == "two"
        expect(page.locator("#entries")).not_to_be_visible()


def test_the_slider_has_the_range_and_the_words_of_its_mode(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    said = demo.client.get("/v1/steering").json()
    can = demo.client.get("/v1/directions/refusal").json()["meta"]["modes"]
    expect(opened.page.locator("#mode option:not([disabled])")).to_have_count(
        len(can)
    )  # what the file has no tensors for
    for mode in can:
        opened.page.select_option("#mode", mode)
        scale = said["scales"][mode]
        expect(opened.page.locator("#strength")).to_have_attribute("min", f"{scale['low']:g}")
        expect(opened.page.locator("#strength")).to_have_attribute("max", f"{scale['high']:g}")
        expect(opened.page.locator("#strength-text")).to_have_text(scale["means"])
        expect(opened.page.locator("#strength")).to_have_value("1")
    opened.set("#number", "7")
    expect(opened.page.locator("#strength")).to_have_value("7")  # it goes as far as what is asked for
    opened.set("#number", "")
    expect(opened.page.locator("#number")).to_have_value("7")  # nothing is not 0
    expect(opened.page.locator("#colours")).to_contain_text("Orange: it leans the way")


def test_a_new_file_changes_the_receipt(demo: Server, visit: Open, tmp_path: Path) -> None:
    """By the page's own upload, under the name that is served already."""
    opened = visit(demo)
    opened.send()
    other = Direction.load(DEMO).with_meta(strength=1.25).to_bytes()
    (tmp_path / "refusal.safetensors").write_bytes(other)
    opened.page.set_input_files("#file", tmp_path / "refusal.safetensors")
    expect(opened.page.locator("#replaces")).to_contain_text("takes its place")
    opened.page.click("#put")
    expect(opened.page.locator("#report")).to_contain_text("Every check passed")
    expect(opened.page.locator("#list")).to_contain_text(digest(other)[:8])
    opened.send()
    expect(opened.chip()).to_contain_text(digest(other)[:8])
    expect(opened.page.locator(".chip.new")).to_have_text("new version")
    demo.client.put("/v1/directions/refusal", content=DEMO.read_bytes())
    opened.send()
    expect(opened.chip()).to_contain_text(digest(DEMO.read_bytes())[:8])
    expect(opened.page.locator("#list")).to_contain_text(digest(DEMO.read_bytes())[:8])


def test_a_bad_file_shows_every_problem_and_leaves_nothing(demo: Server, visit: Open, tmp_path: Path) -> None:
    good = Direction.load(DEMO)
    wrong = good.tensors() | {
        "weights": torch.ones(good.layers + 1),
        "reference": torch.full_like(good.reference, torch.nan),
    }
    path = tmp_path / "bad file.safetensors"
    path.write_bytes(safetensors.torch.save(wrong, {"format": "pt", "steer": good.meta.model_dump_json()}))
    opened = visit(demo)
    opened.page.set_input_files("#file", path)
    expect(opened.page.locator("#name")).to_have_value("bad-file")
    opened.page.press("#name", "Enter")
    problems = opened.page.locator("#report li")
    expect(problems).to_have_count(2)
    expect(problems.nth(0)).to_contain_text("'weights' has shape")
    expect(problems.nth(1)).to_contain_text("'reference'")
    opened.page.click("#cancel")
    expect(opened.page.locator("#list > li", has_text="bad-file")).to_have_count(0)
    expect(opened.page.locator("#naming")).to_be_hidden()
    opened.page.set_input_files("#file", path)
    expect(opened.page.locator("#naming")).to_be_visible()  # and so the file has given it a name, which goes away
    opened.page.fill("#name", "off")
    opened.page.click("#put")
    expect(problems).to_have_count(1)  # not before the answer is there is it one that can be looked into
    expect(problems).to_contain_text("'off' is not acceptable")


DROP = """bytes => {
    const dataTransfer = new DataTransfer();
    const content = Uint8Array.from(atob(bytes), c => c.charCodeAt(0));
    dataTransfer.items.add(new File([content], "refusal.safetensors"));
    for (const kind of ["dragenter", "dragover", "drop"])
        document.body.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
}"""


def test_a_file_is_dropped_on_a_server_without_directions(visit: Open, tmp_path: Path) -> None:
    with Server("--directions", str(tmp_path)) as server:
        opened = visit(server)
        expect(opened.page.locator("#none")).to_be_visible()
        opened.send("Hello!")
        expect(opened.page.locator(".side")).to_have_count(1)
        opened.page.evaluate(DROP, base64.b64encode(DEMO.read_bytes()).decode())
        opened.page.click("#put")
        expect(opened.page.locator("#direction")).to_have_value("refusal")
        opened.send()
        assert "first get" in opened.text("steered")
        assert server.client.get("/v1/directions/refusal").json()["digest"] == digest(DEMO.read_bytes())


def test_a_refused_request_shows_the_servers_words_in_place(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    opened.page.fill("#max-tokens", "5000")
    opened.send()
    for side in ("plain", "steered"):
        expect(opened.page.locator(f".side.{side} .failed")).to_contain_text("the answer may have 5000, the context is")
    opened.page.fill("#max-tokens", "64")
    for side in ("plain", "steered"):
        opened.page.locator(f".side.{side}").get_by_role("button", name="Ask again").click()
        opened.done()
    expect(opened.page.locator(".failed")).to_have_count(0)
    assert "cannot" in opened.text("plain")


#: By the options of `steer keys new` that the README shows, and what more a policy may say.
SECRETS = {
    name: new_secret() for name in ("guest", "alice", "boss", "plain", "mute", "narrow", "bound", "dosed", "capped")
}
MORE = f"""
[keys.plain]
hash = "{hash_of(SECRETS["plain"])}"

[keys.mute]
hash = "{hash_of(SECRETS["mute"])}"
directions = ["*"]
steer = false

[keys.narrow]
hash = "{hash_of(SECRETS["narrow"])}"
directions = ["refusal"]
modes = ["ablate"]
max_strength = 0.5
tokens = ["last-8", "answer"]
layers = "2-5"

[keys.dosed]
hash = "{hash_of(SECRETS["dosed"])}"
directions = ["refusal"]
max_strength = "calibrated"

[directions.capped]
max_strength = 0.4
tokens = ["answer"]
layers = "1-4"

[keys.capped]
hash = "{hash_of(SECRETS["capped"])}"
directions = ["capped"]
layers = "3-6"

[keys.bound]
hash = "{hash_of(SECRETS["bound"])}"
directions = ["refusal"]
required = "refusal"
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    dose = {"one_sided": (0, 1.2), "ablate": (-0.5, 0.8)}
    Direction.load(DEMO).with_meta(calibrated=dose).save(folder / DEMO.name)
    Direction.load(DEMO).with_meta(strength=1.1).save(folder / "capped.safetensors")
    policy = folder / "policy.toml"
    made = {"guest": ["--direction", "refusal", "--readout"], "alice": ["--direction", "refusal"], "boss": ["--manage"]}
    for name, options in made.items():
        command = [sys.executable, "-m", "steer", "keys", "new", name, "--policy", str(policy), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        SECRETS[name] = done.stdout.strip()
    policy.write_text(policy.read_text() + MORE)
    with Server("--directions", str(folder), "--policy", str(policy)) as server:
        yield server


def enter(opened: Opened, secret: str) -> None:
    opened.page.fill("#key-value", secret)
    opened.page.press("#key-value", "Enter")


def test_an_answer_that_is_cut_off_is_not_shown_as_whole(demo: Server, visit: Open) -> None:
    """By a proxy that closes the connection in order, and by one that does not."""
    opened = visit(demo)
    event = json.dumps({"choices": [{"index": 0, "delta": {"content": "Half"}}]})

    def cut(route: Route) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body=f"data: {event}\n\n")

    opened.page.route(f"**{ROUTE}", cut)
    opened.send()
    told = "The connection to the server was lost: the answer is not whole."
    expect(opened.page.locator(".failed span")).to_have_text([told, told])
    assert opened.text("plain") == "Half"
    torn = """(event) => { window.fetch = async () => {
        let pulled = 0;
        const pull = (body) => {
            if (pulled++) body.error(new TypeError("network error"));
            else body.enqueue(new TextEncoder().encode(event));
        };
        return new Response(new ReadableStream({ pull }, { highWaterMark: 0 }));
    }; }"""
    opened.page.evaluate(torn, f"data: {event}\n\n")
    opened.page.click("#fresh")
    opened.send()
    expect(opened.page.locator(".failed span")).to_have_text([told, told])
    assert opened.text("steered") == "Half"


def test_a_server_with_a_key_is_asked_once_and_the_key_is_kept_nowhere(guarded: Server, visit: Open) -> None:
    opened = visit(guarded, ready=False)
    dialog = opened.page.locator("#key-dialog")
    expect(dialog).to_contain_text("an API key is needed")
    enter(opened, "wrong")
    expect(dialog).to_be_visible()
    enter(opened, SECRETS["guest"])
    expect(opened.page.locator("#direction")).to_have_value("refusal")
    opened.send()
    assert "first get" in opened.text("steered")
    expect(opened.page.locator("#reading")).to_be_visible()
    expect(opened.page.locator(".token.up, .token.down").first).to_be_attached()
    opened.page.click("#copy")
    assert "$STEER_API_KEY" in opened.page.inner_text("#code")
    kept = opened.page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])")
    assert SECRETS["guest"] not in kept + opened.page.content()
    opened.page.reload()
    expect(dialog).to_be_visible()
    opened.page.press("#key-value", "Escape")
    expect(opened.page.locator("#notice")).to_contain_text("an API key is needed")


@pytest.mark.parametrize(
    ("key", "sides", "says"),
    [
        ("alice", 2, "This key may not read along directions"),
        ("boss", 1, "This key may use none of the directions"),
        ("plain", 1, "There is no direction that this key may use"),
        ("mute", 1, "This key may not steer"),
        ("narrow", 2, "This key may not read along directions"),
        ("bound", 2, "This key may not read along directions"),
        ("dosed", 2, "This key may not read along directions"),
        ("capped", 2, "This key may not read along directions"),
    ],
)
def test_what_a_key_may_not_do_is_left_out_with_a_word(
    guarded: Server, visit: Open, key: str, sides: int, says: str
) -> None:
    opened = visit(guarded, ready=False)
    enter(opened, SECRETS[key])
    expect(opened.page.locator("#controls")).to_contain_text(says)
    expect(opened.page.locator("#notice")).not_to_be_visible()
    if key == "bound":  # which cannot ask for it in another mode
        opened.page.select_option("#mode", "ablate")
    opened.send()
    expect(opened.page.locator(".side")).to_have_count(sides)
    expect(opened.page.locator(".failed")).to_have_count(0)
    assert opened.text("plain")
    if sides == 2:
        expect(opened.chip()).to_contain_text("capped" if key == "capped" else "refusal")
        assert opened.text("steered")
    if key == "narrow":
        expect(opened.page.locator("#mode option")).to_have_count(1)
        expect(opened.chip()).to_contain_text("0.5")
        expect(opened.chip()).to_contain_text("@2-5@last-8")
        values = opened.page.locator("#tokens-known option").evaluate_all("all => all.map(one => one.value)")
        assert values == ["last-8", "answer"]
        opened.page.fill("#layers", "")
        opened.page.press("#layers", "Tab")
        expect(opened.page.locator("#layers")).to_have_value("2-5")
    if key == "capped":  # by its own rules and by those of the direction
        expect(opened.chip()).to_contain_text("0.4")
        expect(opened.chip()).to_contain_text("@3-4@answer")
    if key == "dosed":
        expect(opened.chip()).to_contain_text("0.8")
        expect(opened.page.locator("#strength")).to_have_attribute("max", "0.8")
        expect(opened.page.locator("#number")).to_have_attribute("min", "-0.5")
        expect(opened.page.locator("#mode option:not([disabled])")).to_have_count(2)
        opened.page.select_option("#mode", "one_sided")
        expect(opened.page.locator("#strength")).to_have_attribute("max", "1.2")
        opened.done()
    manages = key == "boss"
    expect(opened.page.locator("#choose")).to_be_visible(visible=manages)
    expect(opened.page.locator("#unmanaged")).to_be_visible(visible=not manages)
    expect(opened.page.get_by_role("button", name="Delete refusal")).to_have_count(int(manages))
    refused = [r.url for r in opened.requests if (answer := r.response()) and answer.status not in (200, 401)]
    assert not refused, "nothing was tried that is not allowed"


def test_keyboard(tiny_server: Server, visit: Open) -> None:
    opened = visit(tiny_server)
    page = opened.page
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#message")).to_have_value("one\ntwo")
    page.fill("#max-tokens", "400")
    page.focus("#message")
    page.route(f"**{ROUTE}", lambda _: None)  # both answers are still to come, however fast the server is
    page.keyboard.press("Enter")
    expect(page.locator(".side[aria-busy=true]")).to_have_count(2)
    page.keyboard.press("Escape")
    expect(page.locator(".side .foot", has_text="stopped")).to_have_count(2)
    expect(page.locator("#send")).to_be_visible()
    assert opened.asked()[0]["messages"][0]["content"] == "one\ntwo"
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.id || e.name || e.textContent.trim() || e.className, s.outlineStyle]; })()"
        )
        seen.add(focused[0])
    assert {"model", "direction", "mode", "strength", "live", "view", "layer", "choose", "temperature", "seed"} <= seen
    page.focus("#model")
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "what has the focus is seen"


def test_every_control_has_a_name(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    opened.send()
    unnamed = opened.page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')].filter(e => !e.labels?.length &&"
        " !e.ariaLabel && !e.textContent.trim()).map(e => e.outerHTML)"
    )
    assert unnamed == []
    ids = opened.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, NARROW], ids=["wide", "narrow"])
def test_axe_finds_nothing(demo: Server, visit: Open, scheme: str, size: dict[str, int]) -> None:
    axe = files(pytest.importorskip("axe_playwright_python")).joinpath("axe.min.js").read_text()
    opened = visit(demo, viewport=size, color_scheme=scheme)
    page = opened.page
    page.evaluate(axe)

    def check(state: str) -> None:
        page.mouse.move(0, 0)
        page.wait_for_timeout(300)  # what is painted in the next frame
        found, passed = page.evaluate("axe.run().then(({ violations, passes }) => [violations, passes.length])")
        assert passed > 20, "it has looked"
        told = [
            f"{each['id']}: {node['html'][:200]} {node['failureSummary']}" for each in found for node in each["nodes"]
        ]
        assert not told, f"{state}: " + "\n".join(told)

    check("empty")
    opened.send()
    check("an answer")
    if size == NARROW:
        page.click("#open")
    page.set_checked("#keep", True)
    page.set_checked("#differ", True)
    check("controls, colours and a kept chat")
    page.click("#sweep-start")
    expect(page.locator("#sweep-charts svg")).to_have_count(2)
    check("a sweep")
    page.fill("#layers", "5-2")
    page.press("#layers", "Tab")
    expect(page.locator(".failed")).to_have_count(1)
    check("a refused request")
    page.fill("#layers", "")
    page.press("#layers", "Tab")
    opened.done()
    page.set_input_files("#file", {"name": "bad.safetensors", "mimeType": "", "buffer": b"nothing"})
    page.click("#put")
    page.locator("#report li").first.wait_for()
    check("a refused file")
    page.click("#cancel")
    if size == NARROW:
        page.keyboard.press("Escape")
    page.locator(".side.steered").get_by_role("button", name="Map").click()
    check("a map")
    if size == DESKTOP:
        page.set_checked("#markdown", True)
        check("Markdown")
    page.click("#key")
    check("the key")
    page.keyboard.press("Escape")
    if page.locator("#copy").is_visible():
        page.click("#copy")
        check("code")


def test_dark_and_light_follow_the_system_and_the_toggle(demo: Server, visit: Open) -> None:
    def paper(opened: Opened) -> str:
        return str(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = visit(demo, color_scheme="light"), visit(demo, color_scheme="dark")
    colours = paper(light), paper(dark)
    assert colours[0] != colours[1]
    light.page.click("#theme")
    assert paper(light) == colours[1]
    light.page.reload()
    assert paper(light) == colours[1], "the choice lasts"


@pytest.mark.parametrize("width", [320, 375, 700, 981])
def test_narrow_windows_never_scroll_sideways(demo: Server, visit: Open, width: int) -> None:
    opened = visit(demo, viewport={**NARROW, "width": width})
    opened.send(QUESTION)
    opened.send("A" * 200)

    def sideways() -> int:
        return int(opened.page.evaluate("document.documentElement.scrollWidth - innerWidth"))

    assert sideways() <= 0
    # both at one moment: the page may scroll
    stacked = opened.page.evaluate(
        """() => {
            const [plain, steered] = ["plain", "steered"].map(
                (side) => document.querySelector(`.side.${side}`).getBoundingClientRect());
            return steered.top >= plain.bottom;
        }"""
    )
    assert stacked == (width <= 680)
    if width <= 980:
        expect(opened.page.locator("#strength")).not_to_be_visible()
        opened.page.click("#open")
        expect(opened.page.locator("#strength")).to_be_visible()
        assert sideways() <= 0
        opened.page.keyboard.press("Escape")
        expect(opened.page.locator("#strength")).not_to_be_visible()


def test_tokens_are_coloured_by_what_was_read(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    page = opened.page
    opened.send()
    answer = demo.chat(QUESTION, max_tokens=256, steer="refusal", steer_readout=True).json()["choices"][0]
    read = answer["steer_readout"]
    assert opened.text("steered") == answer["message"]["content"]
    tokens = page.locator(".side.steered .token.up, .side.steered .token.down")
    expect(tokens).to_have_count(len(read["tokens"]))

    def signed(layer: int) -> list[re.Pattern[str]]:
        values = [row[layer] for row in read["directions"][0]["before"]]
        assert {value > 0 for value in values} == {True, False}, "or the test shows little"
        return [re.compile(r"\bup\b" if value > 0 else r"\bdown\b") for value in values]

    expect(tokens).to_have_class(signed(7))
    page.get_by_text("After", exact=True).click()
    expect(tokens).to_have_count(0)  # nothing is left of them, and rounding has no colour
    expect(page.locator(".side.plain .token.up")).not_to_have_count(0)
    page.fill("#layer", "3")
    expect(page.locator("#layer-text")).to_have_text("3")
    page.get_by_text("Before", exact=True).click()
    expect(tokens).to_have_class(signed(3))
    tokens.nth(1).hover()
    tip = page.locator("#tip")
    expect(tip).to_be_visible()
    cells = [c.replace("−", "-") for c in tip.locator("td").all_inner_texts()]
    line = read["directions"][0]
    for cell, value in zip(cells[0:5:2], (line["before"][1][3], line["after"][1][3], read["norms"][1][3]), strict=True):
        assert float(cell) == pytest.approx(value, rel=1e-3, abs=1e-4 * read["norms"][1][3])
    page.focus(".side.plain .text")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".side.plain .token.at")).to_have_count(1)
    page.locator("#message").focus()
    expect(tip).not_to_be_visible()
    page.set_checked("#relative", True)
    expect(page.locator("#high")).to_contain_text("%")
    page.get_by_text("Off", exact=True).click()
    expect(page.locator(".token.up, .token.down")).to_have_count(0)


def test_the_profile_shows_every_layer_and_picks_one(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    profile = demo.client.get("/v1/directions/refusal").json()["profile"]
    charts = opened.page.locator("#profile svg")
    expect(charts).to_have_count(3)
    expect(charts.nth(0).locator("circle")).to_have_count(len(profile))
    expect(charts.nth(0).locator(".value")).to_contain_text(f"layer 7: {profile[7]['angle']:.2f}°")
    box = charts.nth(0).bounding_box()
    assert box
    charts.nth(0).click(position={"x": box["width"] * 2.5 / 8, "y": 30})
    expect(opened.page.locator("#layer-text")).to_have_text("2")
    gap = "([title, value]) => value.getBoundingClientRect().left - title.getBoundingClientRect().right"
    for layer in range(len(profile)):
        opened.page.fill("#layer", str(layer))
        assert all(chart.locator("text").evaluate_all(gap) > 0 for chart in charts.all()), "no text lies on another"
    expect(opened.page.locator("#facts")).to_contain_text(digest(DEMO.read_bytes()))


def test_the_request_as_code_runs(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    opened.send("It's 5 o'clock. Hello!")
    opened.page.fill("#message", QUESTION)
    opened.page.click("#copy")
    codes = {"curl": opened.page.inner_text("#code")}
    opened.page.get_by_text("Python", exact=True).click()
    codes["python"] = opened.page.inner_text("#code")
    for language, code in codes.items():
        command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stderr
        assert '"direction":"refusal"' in done.stdout, language
        assert digest(DEMO.read_bytes()) in done.stdout
    opened.page.get_by_role("button", name="Close").click()
    expect(opened.page.locator("#code-dialog")).not_to_be_visible()


def test_a_server_that_refuses_the_read_out_is_used_without_colours(
    tiny_folder: Path, tmp_path: Path, visit: Open
) -> None:
    direction = models.direction(models.tiny("llama"), shared=True, embedding=True, sites=("writers",))
    direction.save(tmp_path / "written.safetensors")
    with Server(str(tiny_folder), "--directions", str(tmp_path), "--sites", "writers") as server:
        opened = visit(server)
        opened.page.fill("#max-tokens", "8")
        opened.send("hello")
        expect(opened.page.locator("#unread")).to_contain_text("offers no read-out")
        expect(opened.chip()).to_contain_text("written")
        assert opened.text("plain") == server.chat("hello").json()["choices"][0]["message"]["content"]
        opened.send("again")
        assert "steer_readout" not in opened.asked()[-1]


def test_a_server_that_ignores_the_read_out_is_used_without_colours(demo: Server, visit: Open) -> None:
    opened = visit(demo)

    def drop(route: Route) -> None:
        body = dict(route.request.post_data_json or {})
        body.pop("steer_readout", None)
        route.continue_(post_data=body)

    opened.page.route(f"**{ROUTE}", drop)
    opened.send()
    expect(opened.page.locator("#unread")).to_contain_text("ignores the read-out")
    assert "first get" in opened.text("steered")


def test_what_a_model_writes_is_text_and_never_markup(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    opened.send("<img src=x onerror=alert(1)><script>alert(2)</script>")
    assert opened.page.locator(".asked img, .asked script, .side img, .side script").count() == 0
    expect(opened.page.locator(".asked p")).to_have_text("<img src=x onerror=alert(1)><script>alert(2)</script>")


def test_a_message_is_read_word_by_word_and_all_is_mapped(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    page = opened.page
    opened.send()
    before = len(opened.asked())
    page.set_checked("#words", True)
    words = page.locator(".asked .token.up, .asked .token.down")
    expect(words).to_have_count(len(QUESTION.split()))
    expect(page.locator(".asked p")).to_have_text(QUESTION)
    asked = opened.asked()[before:]
    assert {body["messages"][-1]["content"] for body in asked} >= {"How", QUESTION}
    assert all(body["steer"] == "off" and body["max_tokens"] == 1 for body in asked)
    page.evaluate(
        """(steps) => { // in one turn of the page's loop: the keys come before the map is drawn
            const named = [...document.querySelectorAll(".side.steered button")];
            named.find((button) => button.textContent === "Map").click();
            const field = document.querySelector(".side.steered .map canvas");
            field.focus();
            for (let i = 0; i < steps; i++) field.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
        }""",
        len(QUESTION.split()) - 1,
    )
    caption = page.locator(".side.steered .map figcaption")
    expect(caption).to_contain_text("“thread?” of the message, layer 0:")
    page.keyboard.press("ArrowRight")
    expect(caption).not_to_contain_text("of the message")
    for _ in range(3):
        page.keyboard.press("ArrowUp")
    read = demo.chat(QUESTION, max_tokens=1, steer="refusal", steer_readout="refusal").json()["choices"][0][
        "steer_readout"
    ]
    share = 100 * read["directions"][0]["before"][0][3] / read["norms"][0][3]
    found = re.search(r"layer 3: (\S+) %", caption.inner_text())
    assert found
    assert float(found[1].replace("−", "-")) == pytest.approx(share, rel=1e-3)
    page.keyboard.press("Enter")
    expect(page.locator("#layer-text")).to_have_text("3")
    page.locator(".side.steered").get_by_role("button", name="Map").click()
    expect(page.locator(".map")).to_have_count(0)


def test_a_sweep_is_what_the_server_says_of_first_tokens(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    page = opened.page
    page.click("#sweep-start")
    expect(page.locator("#sweep-text")).to_contain_text("Ask something first")
    opened.send()
    before = len(opened.asked())
    page.click("#sweep-start")
    charts = page.locator("#sweep-charts svg")
    expect(charts).to_have_count(2)
    asked = opened.asked()[before:]
    assert [body["steer"] for body in asked].count("off") == 1
    strengths = [body["steer"]["strength"] for body in asked if body["steer"] != "off"]
    assert strengths == [0.25 * i - 1 for i in range(13)]

    def first(steer: Any) -> dict[str, float]:
        body = demo.chat(QUESTION, max_tokens=1, logprobs=True, top_logprobs=20, steer=steer).json()
        content = body["choices"][0]["logprobs"]["content"][0]
        return {item["token"]: math.exp(item["logprob"]) for item in content["top_logprobs"]}

    plain, steered = first("off"), first({"direction": "refusal", "mode": "ablate", "strength": 1})
    word = max(plain, key=lambda token: plain[token]).strip()
    p = sum(value for token, value in steered.items() if token.strip() and word.startswith(token.strip()))
    both = [token for token in plain if token in steered]
    rest = [1 - sum(side[token] for token in both) for side in (plain, steered)]
    kl = sum(plain[token] * math.log(plain[token] / steered[token]) for token in both) + rest[0] * math.log(
        rest[0] / rest[1]
    )
    for chart, value in ((charts.nth(0), math.log(p / (1 - p))), (charts.nth(1), kl)):
        found = re.search(r"at 1: (\S+)", str(chart.locator(".value").text_content()))
        assert found
        assert float(found[1].replace("−", "-")) == pytest.approx(value, rel=0.01)
    box = charts.nth(0).bounding_box()
    assert box
    charts.nth(0).click(position={"x": 5, "y": 40})
    expect(page.locator("#number")).to_have_value("-1")
    opened.done()


@pytest.mark.parametrize("status", [403, 429])
def test_a_sweep_keeps_what_it_has_and_asks_for_the_rest(demo: Server, visit: Open, status: int) -> None:
    opened = visit(demo)
    page = opened.page
    opened.send()
    running = most = passed = 0

    def refuse(route: Route) -> None:
        nonlocal passed
        steer = (route.request.post_data_json or {})["steer"]
        if steer != "off" and steer["strength"] > 0:
            error = {"message": "that is not to be had", "type": "x", "code": "x"}
            route.fulfill(status=status, json={"error": error})
        else:
            passed += 1
            route.continue_()

    def counted(step: int) -> Callable[[Request], None]:
        def count(request: Request) -> None:
            nonlocal running, most
            if request.url.endswith(ROUTE):
                running += step
                most = max(most, running)

        return count

    page.on("request", counted(1))
    page.on("requestfinished", counted(-1))
    page.route(f"**{ROUTE}", refuse)
    page.click("#sweep-start")
    expect(page.locator("#sweep-text")).to_contain_text("of 13 strengths measured: that is not to be had.")
    found = re.search(r"(\d+) of 13", page.inner_text("#sweep-text"))
    assert found
    assert 1 <= int(found[1]) <= 5
    assert int(found[1]) == passed - 1, "and plain"
    expect(page.locator("#sweep-charts circle")).to_have_count(2 * int(found[1]))
    page.unroute(f"**{ROUTE}")
    before = len(opened.asked())
    page.click("#sweep-start")
    expect(page.locator("#sweep-charts circle")).to_have_count(26)
    assert len(opened.asked()) - before == 13 - int(found[1])
    expect(page.locator("#sweep-text")).not_to_contain_text("measured")
    assert most <= 4


def test_words_that_differ_are_marked(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    marked = "[...(CSS.highlights.get('differs') ?? [])].map(range => range.toString())"
    opened.send()
    assert opened.page.evaluate(marked) == []
    opened.page.set_checked("#differ", True)
    opened.page.wait_for_timeout(300)
    sides = [opened.text(side).split() for side in ("plain", "steered")]
    found = opened.page.evaluate(marked)
    assert found
    for mine, other in (sides, sides[::-1]):
        assert all(word in found for word in mine if word not in other)
    opened.page.fill("#strength", "0")
    opened.done()
    opened.page.wait_for_timeout(300)
    assert opened.page.evaluate(marked) == []


HOSTILE = "# Title\n\n- **one** `two`\n- <img src=x onerror=alert(1)>\n\n[go](javascript:alert(2))\n\n```\n<script>\n"


def test_chats_are_kept_exported_and_linked_without_asking(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    page = opened.page
    message = f"{QUESTION} It comes back, whatever I do, and I have tried for hours."
    opened.send(message)
    assert page.evaluate("localStorage.length") == 0, "nothing is kept unless it is wanted"
    page.set_checked("#keep", True)
    texts = [opened.text(side) for side in ("plain", "steered")]
    page.reload()
    expect(page.locator("#chats li")).to_have_count(1)
    assert opened.wider() == 0, "everything is seen, however long the message"
    assert not page.locator(".side").count()
    before = len(opened.asked())
    page.locator("#chats").get_by_role("button", name=message, exact=True).click()
    assert [opened.text(side) for side in ("plain", "steered")] == texts
    with page.expect_download() as download:
        page.click("#export")
    exported = json.loads(download.value.path().read_text())
    assert [exported["turns"][0][side] for side in ("plain", "steered")] == texts
    assert exported["turns"][0]["receipt"][0]["digest"] == digest(DEMO.read_bytes())
    page.click("#share")
    link = page.input_value("#link")
    page.click("#forget")
    expect(page.locator("#chats li")).to_have_count(0)
    assert message not in page.evaluate("JSON.stringify(localStorage)")
    page.set_checked("#keep", False)
    assert page.evaluate("localStorage.length") == 0
    other = visit(demo)
    other.page.goto(link)
    expect(other.page.locator(".side.steered .foot")).to_contain_text("not asked now")
    assert [other.text(side) for side in ("plain", "steered")] == texts
    assert other.page.url == f"{demo.url}/"
    assert not other.asked(), "a link asks nothing"
    assert len(opened.asked()) == before
    other.send("Hello!")
    assert [m["content"] for m in other.asked()[0]["messages"]] == [message, texts[0], "Hello!"]


def test_what_is_left_while_it_is_answered_is_kept_and_nothing_empty(demo: Server, visit: Open) -> None:
    opened = visit(demo)
    page = opened.page
    page.set_checked("#keep", True)
    opened.send("Hello!")
    page.route(f"**{ROUTE}", lambda _: None)  # what is asked now is still to come, however fast the server is
    page.fill("#message", QUESTION)
    page.press("#message", "Enter")
    expect(page.locator(".side[aria-busy=true]")).to_have_count(2)
    page.click("#fresh")
    expect(page.locator("#send")).to_be_visible()
    page.wait_for_load_state("networkidle")
    chats = page.locator("#chats li")
    expect(chats).to_have_count(1)
    page.fill("#message", QUESTION)
    page.press("#message", "Enter")
    page.locator("#chats").get_by_role("button", name="Hello!", exact=True).click()
    page.wait_for_load_state("networkidle")
    expect(page.locator(".asked p").first).to_have_text("Hello!")
    for kept in page.evaluate("Object.values(localStorage).flatMap(text => JSON.parse(text))"):
        assert any(turn["plain"] or turn["steered"] for turn in kept["turns"])


def test_each_key_has_chats_of_its_own(guarded: Server, visit: Open) -> None:
    opened = visit(guarded, ready=False)
    page = opened.page
    enter(opened, SECRETS["guest"])
    expect(page.locator("#direction")).to_have_value("refusal")
    page.set_checked("#keep", True)
    opened.send("Hello!")
    expect(page.locator("#chats li")).to_have_count(1)
    for key, kept in (("alice", 0), ("guest", 1)):
        page.click("#key")
        enter(opened, SECRETS[key])
        expect(page.locator("#chats li")).to_have_count(kept)
        expect(page.locator("#keep")).to_be_checked(checked=bool(kept))
        expect(page.locator(".side")).to_have_count(0)
    assert not [secret for secret in SECRETS.values() if secret in page.evaluate("JSON.stringify(localStorage)")]


def test_an_export_is_opened_and_what_is_none_is_told(demo: Server, visit: Open, tmp_path: Path) -> None:
    opened = visit(demo)
    page = opened.page
    opened.send()
    texts = [opened.text(side) for side in ("plain", "steered")]
    with page.expect_download() as download:
        page.click("#export")
    other = visit(demo)
    other.page.set_input_files("#exported", download.value.path())
    expect(other.page.locator(".side.steered .foot")).to_contain_text("not asked now")
    assert [other.text(side) for side in ("plain", "steered")] == texts
    for name, data in {"prompts.json": b"[]", "picture.json": b"\x89PNG"}.items():
        (tmp_path / name).write_bytes(data)
        other.page.set_input_files("#exported", tmp_path / name)
        expect(other.page.locator("#notice")).to_contain_text(f"{name} holds no chat; accepted: a file of")
    assert [other.text(side) for side in ("plain", "steered")] == texts
    assert not other.asked()
    other.page.evaluate("location.hash = 'chat=abc'")
    expect(other.page.locator("#notice")).to_have_text("This link holds no chat: it was cut short or changed.")


def test_what_of_a_links_steering_is_not_served_is_told(demo: Server, visit: Open) -> None:
    """A direction, a mode or a strength: the next message would be steered otherwise than the ones that are shown."""
    entries = [
        {"direction": "other", "mode": "ablate", "strength": 1},
        {"direction": "refusal", "mode": "nosuch", "strength": 1},
        {"direction": "refusal", "mode": "ablate", "strength": 99},
        {"direction": "refusal", "mode": "rotate", "strength": 1, "norm_preserving": "kept"},
        {"direction": "refusal", "mode": "ablate", "strength": 0.5},
    ]
    for entry in entries:
        chat = {"steer": [entry], "turns": [{"message": "linked", "plain": "p", "steered": "s"}]}
        text = base64.urlsafe_b64encode(json.dumps(chat).encode()).decode().rstrip("=")
        opened = visit(demo)
        opened.page.evaluate("link => { location.hash = link; }", f"chat={text}")
        expect(opened.page.locator(".asked p")).to_have_text("linked")
        if entry is entries[-1]:
            expect(opened.page.locator("#notice")).to_be_hidden()
            expect(opened.page.locator("#number")).to_have_value("0.5")
        else:
            norm = ":norm" if "norm_preserving" in entry else ""
            told = "Not served here as it was: {direction}:{mode}{norm}={strength}.".format(**entry, norm=norm)
            expect(opened.page.locator("#notice")).to_contain_text(told)


def test_a_text_is_read_from_the_side_where_it_begins(demo: Server, visit: Open) -> None:
    chat = {"turns": [{"message": "מה שלומך?", "plain": "טוב.\nfine.", "steered": "fine."}]}
    text = base64.urlsafe_b64encode(json.dumps(chat).encode()).decode().rstrip("=")
    page = visit(demo).page
    page.evaluate("link => { location.hash = link; }", f"chat={text}")
    edge = """(where) => {
        const whole = document.querySelector(where), range = document.createRange();
        const first = document.createTreeWalker(whole, NodeFilter.SHOW_TEXT).nextNode();
        range.setStart(first, 0), range.setEnd(first, 1);
        const box = whole.getBoundingClientRect(), at = range.getBoundingClientRect();
        return at.left - box.left > box.right - at.right;
    }"""
    expect(page.locator(".asked p")).to_be_visible()
    assert [page.evaluate(edge, where) for where in (".asked p", ".plain .text", ".steered .text")] == [
        True,
        True,
        False,
    ]


def test_a_link_asks_before_it_takes_the_place_of_a_chat(demo: Server, visit: Open) -> None:
    kept = {"turns": [{"message": "linked", "plain": "p", "steered": "s"}]}
    text = base64.urlsafe_b64encode(json.dumps(kept).encode()).decode().rstrip("=")
    opened = visit(demo)
    opened.send("Hello!")
    asked: list[str] = []
    for accepted, message in ((False, "Hello!"), (True, "linked")):

        def answer(dialog: Dialog, accepted: bool = accepted) -> None:
            asked.append(dialog.message)
            dialog.accept() if accepted else dialog.dismiss()

        opened.page.once("dialog", answer)
        opened.page.evaluate("link => { location.hash = link; }", f"chat={text}")
        opened.page.wait_for_function("!location.hash")
        expect(opened.page.locator(".asked p")).to_have_text([message])
    assert len(asked) == 2


def test_markdown_is_rendered_without_markup(demo: Server, visit: Open) -> None:
    kept = {"turns": [{"message": "m", "plain": HOSTILE, "steered": HOSTILE}]}
    text = base64.urlsafe_b64encode(json.dumps(kept).encode()).decode().rstrip("=")
    opened = visit(demo)
    opened.page.evaluate("link => { location.hash = link; }", f"chat={text}")
    expect(opened.page.locator(".side")).to_have_count(2)
    opened.page.set_checked("#markdown", True)
    shown = opened.page.locator(".side.plain .formatted")
    expect(shown.locator("li")).to_have_count(2)
    expect(shown.locator("strong")).to_have_text("one")
    expect(shown.locator("pre code")).to_have_text("<script>")
    expect(shown).to_contain_text("<img src=x onerror=alert(1)>")
    assert shown.locator("img, script, a").count() == 0
    expect(opened.page.locator(".side.plain .text")).not_to_be_visible()


def test_slider_and_answers_are_seen_together_in_a_narrow_window(demo: Server, visit: Open) -> None:
    opened = visit(demo, viewport={"width": 390, "height": 800})
    opened.send()
    opened.page.click("#open")
    expect(opened.page.locator("#strength")).to_be_in_viewport(ratio=1)
    opened.page.fill("#strength", "0.5")
    opened.done()
    for side in ("plain", "steered"):
        expect(opened.page.locator(f".side.{side} .text")).to_be_in_viewport(ratio=1)
    expect(opened.page.locator("#strength")).to_be_in_viewport(ratio=1)
