// What steers the steered side: an entry for each direction, of which the controls show one.

import { $, el, shown } from "./dom.js";

const MOST = 4; // as many directions as can be read at once
/** The fields of an entry that mostly say nothing, with what stands in their controls then. */
const NOTHING = { layers: "all", tokens: "all", if: "always", shift: "0", norm_preserving: "free" };
const FIELDS = Object.keys(NOTHING);

export class Steering {
  /** `changed` is called when the user has changed what steers, `picked(listed)` when the controls come to show another
   * direction, or another version of it. */
  constructor({ changed, picked }) {
    Object.assign(this, { changed, picked, entries: [], at: 0, usable: [], shown: null });
    this.offer({ modes: {}, scales: {}, shifting: [], turning: [], tokens: {}, may: { steer: true, readout: true, manage: true, modes: [] } });
    $("direction").addEventListener("change", () => {
      this.entries[this.at] = this.defaults($("direction").value, this.at);
      this.show();
      changed();
    });
    $("mode").addEventListener("change", () => {
      const entry = { ...this.entry, mode: $("mode").value };
      this.set({ mode: entry.mode, strength: this.within(entry, this.at), shift: this.mostShift(entry) ? entry.shift : "", norm_preserving: this.norm(entry) });
    });
    for (const field of FIELDS) $(field).addEventListener("change", () => this.set({ [field]: $(field).value.trim() || this.where(this.listed)[field] }));
    $("strength").addEventListener("input", () => this.set({ strength: Number($("strength").value) }, false));
    $("strength").addEventListener("change", () => this.set({ strength: Number($("strength").value) }));
    $("number").addEventListener("change", () => this.set({ strength: $("number").value === "" ? this.entry.strength : Number($("number").value) }));
    $("default").addEventListener("click", () => this.set(this.defaults(this.entry.direction, this.at)));
    $("add").addEventListener("click", () => {
      this.at = this.entries.push(this.defaults(this.free[0])) - 1;
      this.show();
      changed();
    });
    $("remove").addEventListener("click", () => {
      this.entries.splice(this.at, 1);
      this.at = 0;
      this.show();
      changed();
      $("entries").firstChild.focus();
    });
  }

  /** What `GET /v1/steering` says: only what the key may do is offered. */
  offer({ modes, scales, shifting, turning, tokens, may }) {
    Object.assign(this, { modes, scales, shifting, turning, tokens, may });
    $("mode").replaceChildren(...may.modes.map((mode) => el("option", { value: mode, textContent: spoken(mode) })));
    this.entries = []; // chosen anew: another key may have other rights
    this.shown = null;
  }

  /** The directions that may be used now; `wanted` is shown where it is one of them. */
  list(items, wanted) {
    this.usable = items;
    const names = items.map((item) => item.id);
    this.entries = this.entries.filter((entry) => names.includes(entry.direction));
    if (!this.entries.length && names.length) this.entries = [this.defaults(names[0])];
    const at = this.entries.findIndex((entry) => entry.direction === wanted);
    const place = Math.min(this.at, this.entries.length - 1);
    if (at < 0 && names.includes(wanted)) this.entries[place] = this.defaults(wanted, place);
    this.at = Math.max(0, at >= 0 ? at : place);
    this.show();
  }

  get entry() {
    return this.entries[this.at];
  }

  /** The direction of the controls as it is listed, or undefined. */
  get listed() {
    return this.card(this.entry?.direction);
  }

  card(name) {
    return this.usable.find((item) => item.id === name);
  }

  /** The modes in which the key may ask for a listed direction, and for which its file has what is needed. */
  modesOf({ modes, calibrated, may }) {
    return this.may.modes.filter((mode) => may.tokens.length && modes.includes(mode) && (!may.calibrated || mode in calibrated));
  }

  /** What these fields of an entry of a listed direction are where the user says nothing. */
  where({ may }) {
    const known = tokensOf(may);
    return { layers: may.layers ?? "", tokens: known.includes("all") ? "" : known[0], if: "", shift: "", norm_preserving: may.norm_preserving ? "kept" : "" };
  }

  /** What an entry says of the norm: nothing in a mode that keeps it anyway, and else what the key must or may say. */
  norm({ direction, mode, norm_preserving }) {
    if (this.turning.includes(mode)) return "";
    const must = this.card(direction).may.norm_preserving;
    return must === null ? norm_preserving : must ? "kept" : "";
  }

  /** How far the threshold of an entry's mode may be shifted, up or down. */
  mostShift({ direction, mode }) {
    return this.shifting.includes(mode) ? this.card(direction).may.max_shift : 0;
  }

  get names() {
    return this.entries.map((entry) => entry.direction);
  }

  get free() {
    return this.usable.map((item) => item.id).filter((name) => !this.names.includes(name));
  }

  /** The field `steer`; with `strength` in place of that of the controls. */
  spec(strength = this.entry?.strength) {
    const all = this.entries.map((entry, i) => ({ ...said(entry), strength: i === this.at ? strength : entry.strength }));
    return all.length > 1 ? all : all[0] ?? "off";
  }

  /** Take the entries of a kept conversation, as far as they can be had here. Returns the names that cannot. */
  restore(entries) {
    const names = this.usable.map((item) => item.id);
    const found = entries.filter((entry) => names.includes(entry.direction) && this.modesOf(this.card(entry.direction)).includes(entry.mode));
    if (found.length) this.entries = [];
    for (const entry of found.slice(0, MOST)) {
      const usual = this.defaults(entry.direction), taken = { ...usual, ...entry, layers: entry.layers || usual.layers, tokens: entry.tokens || usual.tokens };
      if (!this.mostShift(taken)) taken.shift = "";
      if (!this.card(entry.direction).may.conditions) taken.if = "";
      taken.norm_preserving = this.norm(taken);
      this.entries.push({ ...taken, strength: this.within(taken) });
    }
    this.at = 0;
    this.show();
    return entries.filter((entry) => !this.entries.some((taken) => ["direction", "mode", "norm_preserving", "strength", "shift", "if"].every((key) => (taken[key] || "") === (entry[key] || ""))))
      .map(({ direction, mode, norm_preserving: norm, strength, shift, if: condition }) =>
        `${direction}${mode && `:${mode}`}${norm ? ":norm" : ""}${shift && `^${shift}`}${condition && `?${condition}`}=${strength}`);
  }

  /** The least and the largest strength that the key may ask for in an entry's mode, as entry `at` beside the others:
   * calibrated doses are shared. */
  bounds(entry, at = this.entries.length) {
    const { may } = this.card(entry.direction), most = may.max_strength;
    if (!may.calibrated) return [-most, most];
    const dose = ({ direction, mode }) => this.card(direction).calibrated[mode] ?? [0, 0];
    const dosed = this.entries.filter((other, i) => i !== at && this.card(other.direction).may.calibrated);
    const taken = dosed.map((other) => Math.abs(other.strength / (dose(other)[Number(other.strength > 0)] || Infinity)));
    const left = Math.max(0, 1 - taken.reduce((total, share) => total + share, 0));
    return dose(entry).map((value) => Math.max(-most, Math.min(most, value * left)));
  }

  within(entry, at, strength = entry.strength) {
    const [low, high] = this.bounds(entry, at);
    return Math.max(low, Math.min(high, strength));
  }

  /** What the file of a direction says, as far as the key may ask for it, as entry `at`. */
  defaults(name, at) {
    const item = this.card(name), modes = this.modesOf(item);
    const entry = { direction: name, mode: modes.includes(item.mode) ? item.mode : modes[0], strength: item.strength, ...this.where(item) };
    return { ...entry, strength: this.within(entry, at), norm_preserving: this.norm(entry) };
  }

  set(values, final = true) {
    Object.assign(this.entry, values);
    this.showEntry();
    this.changed(final);
  }

  show() {
    if (!this.entry) { this.shown = null; return; }
    const others = this.names.filter((_, i) => i !== this.at);
    $("direction").replaceChildren(...this.usable.filter((item) => !others.includes(item.id)).map(({ id }) => el("option", { value: id, textContent: id })));
    this.showEntry();
    const version = `${this.listed.id} ${this.listed.digest}`;
    if (this.shown === version) return;
    this.shown = version;
    this.picked(this.listed);
  }

  /** The range of the slider: what the server says of the mode, and what is asked for now. */
  get range() {
    const { low, high } = this.scales[this.entry.mode] ?? { low: -1, high: 1 };
    return [Math.min(low, this.entry.strength), Math.max(high, this.entry.strength)].map((end) => this.within(this.entry, this.at, end));
  }

  showEntry() {
    const { direction, mode, strength, tokens } = this.entry, [low, high] = this.range;
    $("direction").value = direction;
    for (const option of $("mode").options) option.hidden = option.disabled = !this.modesOf(this.listed).includes(option.value);
    $("mode").value = mode;
    [$("number").min, $("number").max] = this.bounds(this.entry, this.at);
    $("number").value = strength;
    Object.assign($("strength"), { min: low, max: high, value: strength });
    const usual = this.where(this.listed);
    for (const field of FIELDS) Object.assign($(field), { value: this.entry[field], placeholder: usual[field] || NOTHING[field] });
    const most = this.mostShift(this.entry);
    Object.assign($("shift"), { min: -most, max: most });
    $("shift").parentElement.hidden = $("shift-text").hidden = !most;
    $("if").parentElement.hidden = !this.listed.may.conditions;
    $("norm_preserving").parentElement.hidden = this.turning.includes(mode) || this.listed.may.norm_preserving !== null;
    $("if-known").replaceChildren(...this.usable.filter((item) => item.condition).map(({ condition }) => el("option", { value: condition })));
    $("tokens-known").replaceChildren(...tokensOf(this.listed.may).map((value) => el("option", { value })));
    const ticks = [...new Set([low, 0, 1, high])].filter((value) => value >= low && value <= high);
    $("ticks").replaceChildren(...[...ticks, this.listed.strength].map((value) => el("option", { value })));
    $("scale").replaceChildren(...ticks.map((value) => {
      const mark = el("span", { textContent: shown(value) });
      mark.style.setProperty("left", `${(100 * (value - low)) / (high - low || 1)}%`);
      return mark;
    }));
    $("mode-text").textContent = this.modes[mode] ?? "";
    $("strength-text").textContent = this.scales[mode]?.means ?? "";
    const which = this.tokens[tokens.replace(/-\d+$/, "-N")] ?? "";
    $("tokens-text").hidden = !which;
    $("tokens-text").textContent = which;
    $("add").hidden = !this.free.length || this.entries.length >= MOST;
    $("remove").hidden = $("entries").hidden = this.entries.length < 2;
    $("entries").replaceChildren(...this.entries.map((entry, i) => {
      const button = el("button", { type: "button", textContent: `${entry.direction} ${shown(entry.strength)}`, ariaPressed: String(i === this.at) });
      button.addEventListener("click", () => { this.at = i; this.show(); $("entries").children[i].focus(); });
      return button;
    }));
    $("summary").textContent = this.entries.map(summary).join(" + ");
  }
}

const tokensOf = (may) => may.tokens.map((name) => name.replace("N", "1"));
const spoken = (mode) => mode.replaceAll("_", "-");
const where = (entry) => Object.fromEntries(FIELDS.map((field) => [field, field === "shift" ? Number(entry[field]) : field === "norm_preserving" ? entry[field] === "kept" : entry[field]]).filter(([, value]) => value && value !== "all"));
const said = (entry) => ({ direction: entry.direction, mode: entry.mode, strength: entry.strength, ...where(entry) });

function summary(entry) {
  return [`${entry.direction}, ${spoken(entry.mode)} at ${shown(entry.strength)}`, ...Object.entries(where(entry)).map((each) => each.join(" "))].join(", ");
}
