// A direction layer by layer: the angle between the class means, their components, and the cosine to the next layer.

import { el, shown, svg } from "./dom.js";

const WIDTH = 308, HEIGHT = 62, LEFT = 4, RIGHT = 4;
const PLOTS = [
  { title: "Angle between the class means", unit: "°", lines: [["angle", ""]], from: 0 },
  { title: "Harmful ─, harmless ╌", lines: [["component_harmful", ""], ["component_harmless", "other"]], from: 0 },
  { title: "Cosine to the next layer", lines: [["cosine_next", ""]], range: [-1, 1] },
];

/** Fill `box` with the charts of `rows`; `pick` is called with the layer that the user points out. */
export function draw(box, rows, selected, pick) {
  box.replaceChildren(...PLOTS.map((plot) => chart(plot, rows, selected, pick)));
}

/** One chart of `rows`, a row for each place from the left. `plot`: title, unit, lines (a field and a class each), `from` or
 * `range` of the values, `zero` for a line there, `at` for the words of a row's place. */
export function chart(plot, rows, selected, pick) {
  const x = (layer) => LEFT + ((layer + 0.5) * (WIDTH - LEFT - RIGHT)) / rows.length;
  const values = plot.lines.flatMap(([field]) => rows.map((row) => row[field])).filter((value) => value != null);
  const [low, high] = plot.range ?? [Math.min(plot.from ?? Infinity, ...values), Math.max(plot.from ?? -Infinity, ...values)];
  const base = plot.range || plot.zero ? Math.min(high, Math.max(low, 0)) : low, at = plot.at ?? ((row) => `layer ${row.layer}`);
  const y = (value) => 20 + ((high - value) * (HEIGHT - 24)) / (high - low || 1);
  const root = svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT + 4}`, role: "img" });
  const guide = svg("line", { class: "guide", y1: 18, y2: HEIGHT });
  const value = svg("text", { class: "value", x: WIDTH - RIGHT, y: 11 });
  const title = svg("text", { x: LEFT, y: 11 });
  title.textContent = plot.title;
  root.append(title, value, svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: y(base), y2: y(base) }), guide);
  for (const [field, kind] of plot.lines) {
    const known = rows.filter((row) => row[field] != null);
    root.append(svg("polyline", { class: kind, points: known.map((row) => `${x(row.layer)},${y(row[field])}`).join(" ") }));
    if (rows.length > 48) continue;
    for (const row of known) root.append(svg("circle", { class: row.steered ? kind : "off", cx: x(row.layer), cy: y(row[field]), r: rows.length > 24 ? 1.8 : 2.6 }));
  }
  const show = (layer) => {
    const row = rows[layer];
    if (!row) return;
    const parts = plot.lines.map(([field]) => `${shown(row[field])}${row[field] == null ? "" : plot.unit ?? ""}`);
    value.textContent = `${at(row)}: ${parts.join(" / ")}`;
    guide.setAttribute("x1", x(layer));
    guide.setAttribute("x2", x(layer));
  };
  const under = (event) => {
    const box = root.getBoundingClientRect();
    return Math.min(rows.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * rows.length)));
  };
  show(selected);
  root.setAttribute("aria-label", `${plot.title}: ${rows.map((row) => `${at(row)} ${plot.lines.map(([field]) => shown(row[field])).join(" and ")}`).join(", ")}`);
  root.addEventListener("pointermove", (event) => show(under(event)));
  root.addEventListener("pointerleave", () => show(selected));
  root.addEventListener("click", (event) => pick(under(event)));
  return root;
}

/** What the file says about itself, as rows of a list. */
export function facts(direction) {
  const { meta } = direction;
  const parameters = Object.entries(meta.parameters).filter(([, value]) => value != null).map(([name, value]) => `${name} ${value}`);
  const said = {
    Method: [meta.method, ...parameters].join(", "),
    "Source layer": meta.source_layer ?? "each its own",
    Sites: meta.sites.join(", "),
    Prompts: meta.harmful && meta.harmless && `${meta.harmful.count} and ${meta.harmless.count}`,
    Rows: direction.rank > 1 ? direction.rank : null,
    Made: meta.created?.slice(0, 10),
  };
  const list = Object.entries(said).filter(([, value]) => value != null && value !== "");
  return [...list.flatMap(([name, value]) => [el("dt", { textContent: name }), el("dd", { textContent: value })]),
    el("dt", { textContent: "Digest" }), el("dd", {}, el("code", { textContent: direction.digest }))];
}
