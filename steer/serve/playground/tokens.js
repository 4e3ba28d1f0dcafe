// One answer's tokens with what was read at each, their colours, and the tip that shows the numbers.

import { $, el, shown, svg } from "./dom.js";

/** What the page colours by: a direction's name, one of its rows, and a layer's number. */
export const look = { view: "before", name: null, row: 0, layer: 0, relative: false };

/** A component below this share of the stream's norm is what rounding leaves of one that was removed. */
const NONE = 1e-4;

/** Tokens as they come: `add` takes the choices of streamed chunks. */
export class Tokens {
  constructor(box) {
    this.box = box;
    this.text = "";
    this.items = [];
    this.layers = null;
    this.lines = [];
    this.at = -1;
    this.waiting = this.span(""); // the place of text whose read-out is not there yet, or never comes
    box.replaceChildren(this.waiting);
    box.addEventListener("pointerover", (event) => this.point(this.items.findIndex((item) => item.span === event.target)));
    box.addEventListener("pointerleave", () => this.point(-1));
    box.addEventListener("blur", () => this.point(-1));
    box.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || !this.items.length) return;
      event.preventDefault();
      this.point(Math.min(Math.max(this.at + step, 0), this.items.length - 1));
    });
  }

  span(text) {
    return el("span", { className: "token", textContent: text });
  }

  add(choice) {
    const text = choice.delta?.content ?? "";
    this.text += text;
    const read = choice.steer_readout;
    this.waiting.textContent += text;
    if (!read?.tokens.length) return;
    const texts = shares(this.waiting.textContent, read.tokens);
    this.waiting.textContent = "";
    read.tokens.forEach((token, i) => this.put(texts[i], token, read, i));
  }

  /** One more token, which stands in the text as `text`: number `i` of the report `read`. */
  put(text, token, read, i) {
    if (!this.layers) Object.assign(this, { layers: read.layers, lines: read.directions });
    const span = this.span(text), norms = read.norms[i];
    const real = (value, at) => (Math.abs(value) < NONE * norms[at] ? 0 : value);
    const values = (side) => read.directions.map((line) => line[side][i].map(real));
    this.items.push({ span, token, norms, before: values("before"), after: values("after") });
    this.waiting.before(span);
    this.box.tabIndex = 0;
  }

  /** Which of the lines that were read is looked at; -1 where it was not read. */
  get line() {
    return this.lines.findIndex(({ name, row }) => name === look.name && row === look.row);
  }

  /** The value that colours token `item`, or null where there is none. */
  value(item, side = look.view) {
    const at = this.layers.indexOf(look.layer);
    const value = item[side]?.[this.line]?.[at];
    if (value == null) return null;
    return look.relative ? value / (item.norms[at] || 1) : value;
  }

  values() {
    return look.view === "off" || !this.layers ? [] : this.items.map((item) => this.value(item)).filter((value) => value !== null);
  }

  paint(scale) {
    for (const item of this.items) {
      const value = look.view === "off" ? null : this.value(item);
      const much = value === null ? 0 : Math.min(1, Math.abs(value) / (scale || 1));
      const share = `${(much * 72).toFixed(1)}%`, kind = !value ? "" : value > 0 ? "up" : "down";
      if (item.kind === kind && item.share === share) continue; // most tokens of a long answer, in most frames
      Object.assign(item, { kind, share });
      item.span.classList.remove("up", "down");
      if (kind) item.span.classList.add(kind);
      item.span.style.setProperty("--much", share);
    }
  }

  /** Show the tip of token `at`; -1 hides it. */
  point(at) {
    this.items[this.at]?.span.classList.remove("at");
    this.at = at;
    const tip = $("tip"), item = this.items[at];
    tip.hidden = !item;
    if (!item) return;
    item.span.classList.add("at");
    const layer = this.layers.indexOf(look.layer), row = this.line;
    const pick = (side) => item[side][row]?.[layer];
    const norm = item.norms[layer];
    const share = (value) => (value == null || !norm ? "" : `${shown((100 * value) / norm)} %`);
    const line = (name, value, part) => el("tr", {}, el("th", { textContent: name, scope: "row" }), el("td", { textContent: shown(value) }), el("td", { textContent: part }));
    tip.replaceChildren(
      el("code", { textContent: visible(item.token) }),
      el("table", {}, line("before", pick("before"), share(pick("before"))), line("after", pick("after"), share(pick("after"))), line("norm", norm, "")),
      spark(item.before[row] ?? [], item.after[row] ?? [], layer),
      el("div", { className: "soft", textContent: `along ${look.name}, layer ${look.layer}; over all layers: before ╌, after ─` }),
    );
    place(tip, item.span.getBoundingClientRect());
  }
}

/** The scale of all tokens shown: most of them lie within it, and the few beyond have its full colour. */
export function scaleOf(answers) {
  const sizes = answers.flatMap((tokens) => tokens.values()).map(Math.abs).sort((a, b) => a - b);
  return sizes.length ? sizes[Math.min(sizes.length - 1, Math.floor(sizes.length * 0.95))] : null;
}

/** The text that belongs to each token, in order. Alone, a token may lack the space before it, be a part of a character,
 *  or be none of the text (the end): what fits nowhere goes to the last one. */
function shares(text, tokens) {
  let rest = text, missed = 0;
  const out = tokens.map((token) => {
    const at = token ? rest.indexOf(token) : -1;
    if (at < 0 || at > 1 + 4 * missed) {
      missed += 1;
      return "";
    }
    const mine = rest.slice(0, at + token.length);
    rest = rest.slice(mine.length);
    missed = 0;
    return mine;
  });
  out[out.length - 1] += rest;
  return out;
}

const visible = (token) => token.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "(no text)";

function spark(before, after, at) {
  const width = 202, height = 40, all = [...before, ...after, 0].filter((value) => value != null);
  const low = Math.min(...all), high = Math.max(...all), x = (i) => 3 + (i * (width - 6)) / Math.max(1, after.length - 1);
  const y = (value) => 3 + ((high - value) * (height - 6)) / (high - low || 1);
  const points = (values) => values.map((value, i) => `${x(i)},${y(value ?? 0)}`).join(" ");
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", "aria-hidden": "true" },
    svg("line", { class: "axis", x1: 0, x2: width, y1: y(0), y2: y(0) }),
    svg("polyline", { class: "other", points: points(before) }), svg("polyline", { points: points(after) }),
    svg("circle", { cx: x(at), cy: y(after[at] ?? 0), r: 3 }));
}

function place(tip, rect) {
  const { offsetWidth: width, offsetHeight: height } = tip;
  const left = Math.min(Math.max(8, rect.left + rect.width / 2 - width / 2), innerWidth - width - 8);
  const above = rect.top > innerHeight / 2; // where there is more room
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${above ? Math.max(8, rect.top - height - 8) : Math.min(rect.bottom + 8, innerHeight - height - 8)}px`);
}
