"""`python -m docs.screenshots`: the pictures of the playground in this folder, from a real server in a real browser."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from PIL import Image

from steer.direction import Direction
from tests.browser import MISSING, browser
from tests.servers import ROOT, Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FOLDER = ROOT / "docs"
DIRECTION = ROOT / "directions" / "refusal.safetensors"
QUESTIONS = ("How should I kill a zombie thread?", "How do I build a kite?")
DESKTOP, NARROW, SLIDER = (1320, 840), (390, 800), (1100, 540)
#: The strengths of the animation, and how long each stays, in milliseconds.
STRENGTHS = {"0": 1500, "0.2": 1000, "0.5": 1000, "1": 3000}


def opened(browser: Browser, url: str, size: tuple[int, int], scheme: str) -> Page:
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(url)
    page.wait_for_load_state("networkidle")
    return page


def ask(page: Page, *questions: str) -> None:
    for question in questions:
        page.fill("#message", question)
        page.press("#message", "Enter")
        page.locator("#send").wait_for(state="visible")
    page.wait_for_timeout(500)  # the last frame is painted, and scrolling has come to rest


def shoot(page: Page, name: str) -> None:
    page.screenshot(path=FOLDER / f"playground-{name}.png")
    page.context.close()


def animate(page: Page) -> None:
    """The slider moves, and the steered side answers again."""
    page.check("#live")
    frames = []
    for strength in STRENGTHS:
        with page.expect_response("**/v1/chat/completions"):
            page.fill("#strength", strength)
        page.locator("#send").wait_for(state="visible")
        page.wait_for_timeout(500)
        page.evaluate("scrollTo(0, 0)")
        frames.append(Image.open(io.BytesIO(page.screenshot())).convert("P", palette=Image.Palette.ADAPTIVE, colors=64))
    first, *others = frames
    path = FOLDER / "playground-slider.gif"
    first.save(path, save_all=True, append_images=others, duration=list(STRENGTHS.values()), loop=0)
    page.context.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        shutil.copy(DIRECTION, folder)
        with Server("--directions", folder) as server:
            for scheme in ("light", "dark"):
                page = opened(chromium, server.url, DESKTOP, scheme)
                ask(page, *QUESTIONS)
                page.locator(".side.steered .token").nth(-3).hover()  # below it nothing is hidden
                shoot(page, scheme)

            page = opened(chromium, server.url, SLIDER, "light")
            ask(page, QUESTIONS[0])
            animate(page)

            page = opened(chromium, server.url, NARROW, "light")
            ask(page, QUESTIONS[0])
            shoot(page, "narrow")

            page = opened(chromium, server.url, DESKTOP, "light")
            page.fill("#message", QUESTIONS[0])
            page.press("#message", "Enter")
            page.locator(".side.steered .token").nth(9).wait_for(state="attached")
            shoot(page, "streaming")

            page = opened(chromium, server.url, DESKTOP, "dark")
            page.fill("#max-tokens", "5000")
            ask(page, QUESTIONS[0])
            page.set_input_files("#file", bad_file(Path(folder)))
            page.click("#put")
            page.locator("#report li").first.wait_for()
            page.click("#cancel")
            page.locator("#report").scroll_into_view_if_needed()
            shoot(page, "errors")


def bad_file(folder: Path) -> Path:
    """A direction file that breaks several rules."""
    good = Direction.load(DIRECTION)
    wrong = good.tensors() | {
        "weights": torch.ones(good.layers + 1),
        "directions": good.directions * 2,
        "reference": good.reference * torch.nan,
    }
    path = folder / "candidate"  # without the suffix, so that the server's own watch passes it by
    path.write_bytes(safetensors.torch.save(wrong, {"format": "pt", "steer": good.meta.model_dump_json()}))
    return path


if __name__ == "__main__":
    if MISSING:
        raise SystemExit(MISSING)
    main()
