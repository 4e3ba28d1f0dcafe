"""A report as a page: the tables that the command prints, what each figure means, and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from steer.lab.evaluation.arms import PLAIN
from steer.lab.evaluation.figures import Row, judged_by
from steer.lab.evaluation.report import ArmOnSet, Difference, Report, SetResult, SteeredArm
from steer.lab.outcome import OUTCOMES, Outcome
from steer.lab.plots import Compared, Curve, Point, curves, forest, front, histogram, picture
from steer.lab.prompts import PromptSet, messages_of
from steer.lab.tables import Table, markdown, terminal_width, wrapped

#: Outcomes that have a column even if no answer has the outcome.
ALWAYS = ("shown", "degenerate", "complied")
#: A difference with a p-value below this is hardly chance.
SURE = 0.05
#: The figures that a picture shows over the strength.
FIGURES = (*ALWAYS, "right")

NOTES = """\
Each answer has one outcome, and columns of outcomes that no answer has are left out: *shown* (the matcher finds the
behaviour at its beginning), *late* (it shows it near its end), *unanswered* (cut before it said anything), *degenerate*
(empty, a loop, no text, a quarter as long as the plain one, no end), *deflected* (to something else, which only a judge
can tell) and *complied*. *Right* answers complied and are as expected.
Rates have the 95 % interval of Wilson, a mean KL that of the bootstrap over prompts. Differences are paired, arm less
plain on the same prompts, with Newcombe's interval; p is that of the exact McNemar test, corrected (Holm) for the
number of arms."""


def tables(report: Report, *, paired: bool = True, table: Table = markdown) -> str:
    """Every figure as tables, without pictures. With `paired`, the paired differences from plain are a table; without
    it, sentences name the differences that are hardly chance."""
    parts = []
    for one in report.sets:
        parts.append(f"### {one.name}, {one.dataset.count} prompts\n\n" + _outcomes(one.arms, table))
        if any(arm.against_plain for arm in one.arms):
            parts.append(_differences(one.arms, table) if paired else sure(one.arms))
        if not one.limit_tells and (cut := max(arm.unended for arm in one.arms)):
            parts.append(
                f"Up to {cut} of {one.dataset.count} answers were cut at {report.conditions.max_tokens} tokens. Plain "
                "answers that do not show the behaviour do not end before that either, so an answer without an end is "
                "not counted as degenerate; with a larger --max-tokens it may be."
            )
        parts += only_cut(one, report.conditions.max_tokens)
    if report.agreements:
        agreed = [
            (a.first, a.second, str(a.count), f"{a.kappa:.2f} ({a.low:.2f} … {a.high:.2f})") for a in report.agreements
        ]
        parts.append("### Agreement on shown\n\n" + table(("", "", "answers", "Cohen's kappa"), agreed))
    if report.divergence:
        rows = [
            (
                *(d.arm, f"{d.first_mean:.5f}", f"{d.first_p95:.5f}"),
                *(f"{d.mean:.5f} ({d.low:.5f} … {d.high:.5f})", f"{d.median:.5f}", f"{d.p95:.5f}"),
            )
            for d in report.divergence
        ]
        head = ("arm", "first token, mean", "p95", "all tokens, mean", "median", "p95")
        parts.append("### KL(plain ‖ steered) on harmless, nats\n\n" + table(head, rows))
    if report.doses:
        parts.append(_doses(report, table))
    if report.comparisons:
        parts.append(_comparisons(report, table))
    if report.text is not None:
        rows = [
            (a.arm, f"{a.perplexity:.4f}", "" if a.ratio is None else _spread(a.ratio, "{:.4f}"))
            for a in report.text.arms
        ]
        title = f"### Perplexity of {report.text.dataset.name}, {report.text.tokens} tokens\n\n"
        parts.append(title + table(("arm", "perplexity", "÷ plain"), rows))
    if report.tasks:
        rows = [
            (
                s.task,
                s.metric,
                s.arm,
                str(s.samples),
                f"{s.value:.4f}",
                "" if s.against_plain is None else _spread(s.against_plain, "{:+.4f}"),
            )
            for s in report.tasks
        ]
        head = ("task", "metric", "arm", "samples", "score", "compared with plain")
        parts.append("### Tasks of lm_eval\n\n" + table(head, rows))
    return "\n\n".join(parts)


def only_cut(one: SetResult, limit: int) -> list[str]:
    """A sentence for each arm with degenerate answers that may be sound: they were cut at the limit, and so were
    answers of the plain model."""
    sentences = []
    for arm in one.arms:
        cut = arm.faults.get("unended", 0)
        if cut and arm.arm != PLAIN and any(plain.unended for plain in one.arms if plain.arm == PLAIN):
            sentences.append(
                f"{arm.arm}: {cut} of the {arm.degenerate.hits} degenerate answers only ran into --max-tokens {limit}, "
                "as answers of the plain model do: give more."
            )
    return sentences


def write(
    report: Report,
    folder: Path,
    projections: Mapping[str, Mapping[str, Sequence[float]]],
    rows: Mapping[tuple[str, str], Sequence[Row]],
    sets: Mapping[str, PromptSet],
) -> None:
    """Write `report.json`, `report.md` and its pictures (see `draw`). If there are answers, also write `answers.jsonl`,
    which `steer classify` reads.

    Args:
        projections: see `draw`.
        rows: the answers to `sets` with their outcomes, by set and arm.
    """
    pictures = draw(report, folder, projections)
    (folder / "report.json").write_text(json.dumps(report.model_dump(mode="json"), indent=2) + "\n", "utf-8")
    (folder / "report.md").write_text(render(report, pictures), "utf-8")
    if rows:
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            for (name, arm), own in rows.items():
                for prompt, row in zip(sets[name].prompts, own, strict=True):
                    asked = {"set": name, "arm": arm, "messages": messages_of(prompt)}
                    content = {"answer": row.answer.text, "ids": row.answer.ids}
                    file.write(json.dumps(asked | asdict(row) | content) + "\n")


def render(report: Report, pictures: Mapping[str, str]) -> str:
    """The whole page as Markdown. `pictures` has the pictures' file names by their titles."""
    asked = report.conditions
    limit = f"greedy answers of at most {asked.max_tokens} tokens"
    head = [
        f"# What {', '.join(dict.fromkeys(arm.file for arm in report.arms))} does to {asked.model}",
        f"{report.tool}, {report.created}. Backend {asked.backend}, {limit}. "
        f"Behaviour: {asked.behaviour}." + (f" Judged by {', '.join(asked.judges)}." if asked.judges else ""),
        markdown(
            ("arm", "method", "mode", "strength", "digest"),
            [(a.name, a.method, a.mode, f"{a.strength:g}", a.digest[:12]) for a in report.arms],
        ),
        "## Outcomes",
        NOTES,
    ]
    shown = [f"![{title}]({file})" for title, file in pictures.items()]
    software = ", ".join(f"{name} {version}" for name, version in asked.software.items())
    return "\n\n".join([*head, *shown, tables(report), f"Made with {software}."]) + "\n"


def _seen(arms: Sequence[ArmOnSet]) -> list[Outcome]:
    return [it for it in OUTCOMES if it in ALWAYS or any(getattr(arm, it).hits for arm in arms)]


def _outcomes(arms: Sequence[ArmOnSet], table: Table) -> str:
    columns = {"arm": [arm.arm for arm in arms]}
    for outcome in _seen(arms):
        columns[outcome] = [str(getattr(arm, outcome)) for arm in arms]
    if any(arm.right for arm in arms):
        columns["right"] = ["" if arm.right is None else str(arm.right) for arm in arms]
    for judge in arms[0].judged:
        judged = [arm.judged[judge] for arm in arms]
        columns[judged_by(judge)] = [str(one.shown) for one in judged]
        if any(one.silent for one in judged):
            columns[f"without a verdict by {judge}"] = [str(one.silent) for one in judged]
    if any(arm.faults for arm in arms):
        columns["faults"] = [", ".join(f"{n} {fault}" for fault, n in arm.faults.items()) for arm in arms]
    columns["mean tokens"] = [f"{arm.tokens_mean:.1f}" for arm in arms]
    return table(list(columns), list(zip(*columns.values(), strict=True)))


def _doses(report: Report, table: Table) -> str:
    """A table of what each way to steer does at an equal KL."""
    kl = {d.arm: f"{d.mean:.5f} ({d.low:.5f} … {d.high:.5f})" for d in report.divergence}
    rows = []
    for dose in sorted(report.doses, key=lambda dose: dose.kl):
        arm = "" if dose.strength is None else f"{dose.way}={dose.strength:g}"
        shown = [str(next((a.shown for a in one.arms if a.arm == arm), "–")) for one in report.sets]
        rows.append((f"{dose.kl:g}", arm or f"{dose.way}: not reached", kl.get(arm, "–"), *shown))
    head = ("asked for", "arm", "KL on all of harmless", *(f"{one.name}: shown" for one in report.sets))
    return "### At an equal KL\n\n" + table(head, rows)


def _comparisons(report: Report, table: Table) -> str:
    """A table of the differences between arms that steer."""
    columns = [(one.name, figure) for one in report.sets for figure in ("shown", "degenerate")]
    rows = [
        (
            *(one.arm, one.against),
            *(_difference(one.sets[name][figure]) for name, figure in columns),
            "–" if one.kl is None else _difference(one.kl, "{:.2f}"),
        )
        for one in report.comparisons
    ]
    head = ("arm", "less", *(f"{name}: {figure}" for name, figure in columns), "KL ÷")
    return "### Arms beside each other\n\n" + table(head, rows)


def _differences(arms: Sequence[ArmOnSet], table: Table) -> str:
    steered = [arm for arm in arms if arm.against_plain]
    absent = set(OUTCOMES) - set(_seen(arms))
    figures = [it for it in dict.fromkeys(it for arm in steered for it in arm.against_plain) if it not in absent]
    rows = [(arm.arm, *(_difference(arm.against_plain[figure]) for figure in figures)) for arm in steered]
    return table(("compared with plain", *figures), rows)


def sure(arms: Sequence[ArmOnSet]) -> str:
    """A sentence for each arm that steers, with the differences that are hardly chance."""
    lines = []
    for arm in arms:
        if found := arm.against_plain:
            small = {name: (d.value, p) for name, d in found.items() if (p := d.p_holm) is not None and p < SURE}
            named = [f"{name} {value:+.1%} (p {_p(p)})" for name, (value, p) in small.items()]
            message = f"{', '.join(named)}; other differences" if named else "all differences"
            line = f"{arm.arm} compared with plain: {message} may be chance (p ≥ {SURE:g})"
            lines.append(wrapped(line, terminal_width(), further="  "))
    return "\n".join(lines)


def _difference(difference: Difference, form: str = "{:+.1%}") -> str:
    p = difference.p_holm
    return _spread(difference, form) + ("" if p is None else f" p {_p(p)}")


def _spread(difference: Difference, form: str) -> str:
    value, low, high = (form.format(v) for v in (difference.value, difference.low, difference.high))
    return f"{value} ({low} … {high})"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def draw(report: Report, folder: Path, projections: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, str]:
    """Write the pictures that the report has data for into `folder`.

    Args:
        projections: the projections of each set, by the title of the panel that shows them.

    Returns:
        The pictures' file names, by their titles.
    """
    files = {}
    for sweep in _sweeps(report):
        name = sweep[0].way.replace(":", "-").replace("/", "_")
        files[f"Outcomes and divergence by strength: {sweep[0].way}"] = f"strength-{name}.png"
        _draw_sweep(report, sweep, folder / f"strength-{name}.png")
    files["Differences from the plain arm, paired, with 95 % intervals"] = "differences.png"
    _draw_differences(report, folder / "differences.png")
    if len(report.arms) > 1 and report.divergence:
        files["Arms by what is left of the behaviour and what they cost"] = "front.png"
        _draw_front(report, folder / "front.png")
    if projections:
        files["Projections of the two sets on the direction, plain model"] = "projections.png"
        with picture(folder / "projections.png", len(projections)) as axes:
            for panel, (title, sets) in zip(axes, projections.items(), strict=True):
                histogram(panel, sets, x="component along the direction", title=title)
    return files


def _sweeps(report: Report) -> list[list[SteeredArm]]:
    """The groups of three or more arms that differ only in the strength, each by rising strength."""
    families: dict[str, list[SteeredArm]] = {}
    for arm in report.arms:
        families.setdefault(arm.way, []).append(arm)
    return [sorted(family, key=lambda a: a.strength) for family in families.values() if len(family) > 2]


def _draw_sweep(report: Report, sweep: Sequence[SteeredArm], path: Path) -> None:
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


def _draw_differences(report: Report, path: Path) -> None:
    """Draw the figures that differ from plain in any arm. The other figures are only in the tables."""
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
                panel.set_yticklabels([])  # the panel before it shows the same labels
            names = [row.name for row in compared]


def _draw_front(report: Report, path: Path) -> None:
    shown = {arm.arm: arm.shown.rate for arm in report.sets[0].arms}
    kl = {d.arm: d.mean for d in report.divergence}
    points = [Point(shown[a.name], kl[a.name], a.way, f"{a.strength:g}") for a in report.arms]
    with picture(path) as (axes,):
        front(axes, points, x=f"shown, {report.sets[0].name}", y="KL(plain ‖ steered) on harmless, nats", log=True)
