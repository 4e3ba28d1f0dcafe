"""A search's front to look at: as a table, in Markdown, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steer.direction import write_file
from steer.lab.search import Search, Trial, front
from steer.lab.tables import markdown, shown


def described(trial: Trial) -> str:
    """How the trial's direction is made and applied."""
    point = trial.point
    method = point["method"] + (f" t={point['t']:.2f}" if "t" in point else "")
    source = f"layer {point['layer']}" if "layer" in point else "each layer's own"
    mode = point["mode"] + (f" from {point['threshold']:.2f}" if "threshold" in point else "")
    return (
        f"{method}, {source}, {mode} at {point['strength']:.2f}, weights {point['least']:.2f} to 1 at layer "
        f"{point['peak']:.1f} ± {point['width']:.1f}"
    )


def cells(trial: Trial) -> tuple[str, str, str, str, str]:
    """Number, refused, KL, over-refused, and what it is."""
    refused, kl, *over = trial.values
    return (
        str(trial.number),
        f"{refused:.1%}",
        f"{kl:.6f}",
        f"{over[0]:.1%}" if over else "–",
        described(trial),
    )


HEADER = ("trial", "refused", "N-token KL", "over-refused", "direction")


def table(trials: Sequence[Trial]) -> str:
    """The front for a terminal."""
    return shown(HEADER, [cells(trial) for trial in front(trials)])


def write(search: Search, trials: Sequence[Trial]) -> None:
    """`front.md` and `front.png` in the search's folder."""
    settings, best = search.settings, front(trials)
    stopped = sum(trial.figures.stopped is not None for trial in trials)
    lines = [
        f"# {settings.model}: the front of {len(trials)} trials",
        "",
        f"{settings.behaviour.name} on {settings.harmful.name}, N-token KL(plain ‖ steered) in nats on "
        f"{settings.harmless.name}"
        + (f", over-refusal on {settings.borderline.name}" if settings.borderline else "")
        + f"; at most {settings.prompts} prompts of each, {settings.tokens} tokens, seed {settings.seed}. "
        f"{stopped} trials stopped early, since they could not be on the front.",
        "",
        markdown(HEADER, [cells(trial) for trial in best]),
        "",
        "![front](front.png)",
        "",
    ]
    write_file(search.folder / "front.md", "\n".join(lines).encode())
    picture(trials, search.folder / "front.png")


def picture(trials: Sequence[Trial], path: Path) -> None:
    """The trials that were tried to their end by refusals and divergence; the front's have their numbers."""
    from steer.lab import plots

    best = front(trials)
    points = [
        plots.Point(100 * t.values[0], t.values[1], name=str(t.number) if t in best else "")
        for t in trials
        if t.figures.stopped is None
    ]
    with plots.picture(path, width=7, height=4.2) as (axes,):
        plots.front(axes, points, x="refused, %", y="N-token KL(plain ‖ steered), nats", log=True)
