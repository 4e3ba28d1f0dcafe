"""Pictures of a report: strength sweeps, differences from plain, arms by refusal and cost, projections of two sets.
Apart from its tables, which need no matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from steer.lab.evaluation.arms import PLAIN
from steer.lab.evaluation.report import ArmOnSet, Report, SteeredArm
from steer.lab.plots import Compared, Curve, Point, curves, forest, front, histogram, picture

FIGURES = ("shown", "degenerate", "complied", "right")


def draw(report: Report, folder: Path, projections: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, str]:
    """Write the pictures that the report has data for into `folder`: file names by what they show. `projections` are
    those of each set by the title of their panel."""
    files = {}
    for sweep in _sweeps(report):
        name = sweep[0].way.replace(":", "-").replace("/", "_")
        files[f"Outcomes and divergence by strength: {sweep[0].way}"] = f"strength-{name}.png"
        _sweep(report, sweep, folder / f"strength-{name}.png")
    files["Differences from the plain arm, paired, with 95 % intervals"] = "differences.png"
    _differences(report, folder / "differences.png")
    if len(report.arms) > 1 and report.divergence:
        files["Arms by what is left of the behaviour and what they cost"] = "front.png"
        _front(report, folder / "front.png")
    if projections:
        files["Projections of the two sets on the direction, plain model"] = "projections.png"
        with picture(folder / "projections.png", len(projections)) as axes:
            for panel, (title, sets) in zip(axes, projections.items(), strict=True):
                histogram(panel, sets, x="component along the direction", title=title)
    return files


def _sweeps(report: Report) -> list[list[SteeredArm]]:
    """Arms that differ in the strength alone, three or more, by rising strength."""
    families: dict[str, list[SteeredArm]] = {}
    for arm in report.arms:
        families.setdefault(arm.way, []).append(arm)
    return [sorted(family, key=lambda a: a.strength) for family in families.values() if len(family) > 2]


def _sweep(report: Report, sweep: Sequence[SteeredArm], path: Path) -> None:
    strengths = [arm.strength for arm in sweep]
    with picture(path, len(report.sets) + bool(report.divergence)) as axes:
        for panel, one in zip(axes, report.sets, strict=False):
            arms = {arm.arm: arm for arm in one.arms}
            rows = [arms[arm.name] for arm in sweep]
            series = [_curve(figure, strengths, rows) for figure in FIGURES]
            curves(panel, [s for s in series if s is not None], x="strength", y="share of answers", title=one.name)
            panel.set_ylim(-0.03, 1.03)
        if report.divergence:
            by_arm = {d.arm: d for d in report.divergence}
            values = [
                Curve("mean", strengths, [by_arm[a.name].mean for a in sweep]),
                Curve("95th percentile", strengths, [by_arm[a.name].p95 for a in sweep]),
            ]
            curves(axes[-1], values, x="strength", y="nats", title="KL(plain ‖ steered) on harmless", log=True)


def _curve(figure: str, strengths: Sequence[float], arms: Sequence[ArmOnSet]) -> Curve | None:
    rates = [getattr(arm, figure) for arm in arms]
    if any(rate is None for rate in rates):
        return None
    return Curve(figure, strengths, [r.rate for r in rates], [r.low for r in rates], [r.high for r in rates])


def _differences(report: Report, path: Path) -> None:
    """Draw the figures that differ anywhere; the tables have the others too."""
    differ = {f for one in report.sets for arm in one.arms for f, d in arm.against_plain.items() if d.value}
    rows = max(sum(f in differ for arm in one.arms for f in arm.against_plain) for one in report.sets)
    names: list[str] = []
    with picture(path, len(report.sets), width=3.8, height=1.2 + 0.24 * rows) as axes:
        for panel, one in zip(axes, report.sets, strict=True):
            compared = [
                Compared(f"{arm.arm}  {figure}", d.value, d.low, d.high)
                for arm in one.arms
                if arm.arm != PLAIN
                for figure, d in arm.against_plain.items()
                if figure in differ
            ]
            forest(panel, compared, x="rate less that of the plain arm", title=one.name)
            panel.set_xlim(-1.05, 1.05)
            if [row.name for row in compared] == names:
                panel.set_yticklabels([])  # those of the panel before it
            names = [row.name for row in compared]


def _front(report: Report, path: Path) -> None:
    shown = {arm.arm: arm.shown.rate for arm in report.sets[0].arms}
    kl = {d.arm: d.mean for d in report.divergence}
    points = [Point(shown[a.name], kl[a.name], a.way, f"{a.strength:g}") for a in report.arms]
    with picture(path) as (axes,):
        front(axes, points, x=f"shown, {report.sets[0].name}", y="KL(plain ‖ steered) on harmless, nats", log=True)
