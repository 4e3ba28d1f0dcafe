// The read-out of one answer as a map: a column for each token, a row for each layer, the last on top.

import { el, shown } from "./dom.js";
import { look } from "./tokens.js";

const GAP = 4; // between the message and its answer
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

export class HeatMap {
  /** `parts`: the tokens of the message, where they were read, and those of the answer. `pick` is called with a layer. */
  constructor(parts, pick) {
    this.parts = parts;
    this.at = [0, 0];
    Object.assign(this, { width: 1, height: 1, shift: 0, before: 0 }); // until it is drawn, once it has a size
    this.ends = [el("i", { className: "up" }), el("i", { className: "down" })]; // which say what the theme's colours are
    this.canvas = el("canvas", { tabIndex: 0, ariaLabel: "Map of layers and tokens; arrow keys move, Enter picks the layer" });
    this.canvas.setAttribute("role", "img");
    this.text = el("figcaption", { className: "soft small", ariaLive: "polite" });
    this.root = el("figure", { className: "map" }, el("div", { className: "scroll" }, this.canvas), this.text, ...this.ends);
    this.canvas.addEventListener("pointermove", (event) => this.point(this.cell(event)));
    this.canvas.addEventListener("pointerleave", () => this.say());
    this.canvas.addEventListener("click", (event) => pick(this.cell(event)[1]));
    this.canvas.addEventListener("keydown", (event) => {
      if (event.key === "Enter") pick(this.at[1]);
      const step = STEPS[event.key];
      if (!step) return;
      event.preventDefault();
      this.point(this.at.map((value, i) => value + step[i]));
    });
    new ResizeObserver(() => this.draw()).observe(this.root);
    this.say();
  }

  /** What is drawn: items with the tokens that they are of. */
  get columns() {
    return this.parts().flatMap((tokens, part) => tokens.items.map((item) => ({ tokens, item, part })));
  }

  get layers() {
    return this.columns.at(-1)?.tokens.layers ?? [];
  }

  get side() {
    return look.view === "off" ? "before" : look.view;
  }

  /** The share of the stream's norm, by which layers can be compared. */
  share({ tokens, item }, layer) {
    const at = tokens.layers.indexOf(layer), value = item[this.side][tokens.line]?.[at];
    return value == null || !item.norms[at] ? null : value / item.norms[at];
  }

  draw() {
    const { columns, layers } = this;
    if (!columns.length || !this.root.clientWidth) return;
    const shift = columns[0].part === columns.at(-1).part ? 0 : GAP;
    const width = Math.max(4, Math.min(16, Math.floor((this.root.clientWidth - shift) / columns.length)));
    const height = Math.max(4, Math.min(14, Math.floor(200 / layers.length)));
    const size = [columns.length * width + shift, layers.length * height], dense = devicePixelRatio || 1;
    Object.assign(this, { width, height, shift, before: columns.filter(({ part }) => part < columns.at(-1).part).length });
    Object.assign(this.canvas, { width: size[0] * dense, height: size[1] * dense });
    this.canvas.style.setProperty("width", `${size[0]}px`);
    this.canvas.style.setProperty("height", `${size[1]}px`);
    const shares = columns.map((column) => layers.map((layer) => this.share(column, layer)));
    const sizes = shares.flat().filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
    this.scale = sizes[Math.floor((sizes.length - 1) * 0.98)] || 1;
    const [up, down] = this.ends.map((end) => getComputedStyle(end).backgroundColor), pen = this.canvas.getContext("2d");
    pen.scale(dense, dense);
    shares.forEach((column, i) => column.forEach((value, j) => {
      if (value === null) return;
      pen.globalAlpha = Math.min(1, Math.abs(value) / this.scale);
      pen.fillStyle = value > 0 ? up : down;
      pen.fillRect(this.x(i), (layers.length - 1 - j) * height, width, height);
    }));
    pen.globalAlpha = 1;
    pen.strokeStyle = getComputedStyle(this.text).color;
    pen.strokeRect(0.5, (layers.length - 1 - layers.indexOf(look.layer)) * height + 0.5, size[0] - 1, height - 1);
    if (!this.pointed) this.say();
  }

  x(column) {
    return column * this.width + (column >= this.before ? this.shift : 0);
  }

  /** The column and layer under the pointer. */
  cell(event) {
    const box = this.canvas.getBoundingClientRect(), x = event.clientX - box.left;
    const column = Math.floor((x - (x >= this.before * this.width ? this.shift : 0)) / this.width);
    return [column, this.layers.length - 1 - Math.floor((event.clientY - box.top) / this.height)];
  }

  point([column, row]) {
    const { columns, layers } = this, held = (value, most) => Math.min(Math.max(value, 0), most);
    if (!columns.length) return;
    this.at = [held(column, columns.length - 1), held(row, layers.length - 1)];
    const found = columns[this.at[0]], layer = layers[this.at[1]], share = this.share(found, layer);
    this.pointed = true;
    this.text.textContent = `“${found.item.token.trim() || "␣"}”${found.part === columns.at(-1).part ? "" : " of the message"}, layer ${layer}: ${share === null ? "–" : `${shown(100 * share)} %`} of the stream's norm`;
  }

  say() {
    this.pointed = false;
    const message = this.parts().length > 1 ? ", your message first" : "";
    this.text.textContent = `Tokens from left to right${message}, layers from below; the share of the stream's norm, ${this.side} the operation${this.scale ? `. Full colour: ${shown(100 * this.scale)} %` : ""}.`;
  }
}
