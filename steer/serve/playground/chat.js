// The conversation: turns of one message with an answer on each side, each side with its own history.

import { events, inTurns, post, Problem } from "./api.js";
import { differing } from "./compare.js";
import { $, el, perFrame, shown } from "./dom.js";
import { HeatMap } from "./heatmap.js";
import { rendered } from "./markdown.js";
import { scaleOf, Tokens } from "./tokens.js";

export const SIDES = ["plain", "steered"];
const ROUTE = "/v1/chat/completions";
const MOST_WORDS = 100; // of a message that are read

/** One answer on one side, from its first token to its receipt. `again` asks for another in its place, `read` gives the
 * tokens of its map, in which `pick` chooses a layer. */
class Answer {
  constructor(side, { again, read, pick }) {
    Object.assign(this, { side, again, pick, read: () => [...read(), this.tokens], map: null });
    this.abort = new AbortController();
    this.running = true;
    this.box = el("div", { className: "text" });
    this.formatted = el("div", { className: "formatted" });
    this.foot = el("div", { className: "foot" });
    this.root = el("div", { className: `side ${side}` }, el("h2", {}, el("i"), side === "plain" ? "Plain" : "Steered"), this.box, this.formatted, this.foot);
    this.root.setAttribute("aria-busy", "true");
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", side === "plain" ? "Plain answer" : "Steered answer");
    this.tokens = new Tokens(this.box);
    this.made = null;
    this.receipt = null;
  }

  get text() {
    return this.tokens.text;
  }

  end(finish, error) {
    this.running = false;
    this.root.setAttribute("aria-busy", "false");
    this.root.style.removeProperty("min-height");
    if (error) {
      const retry = el("button", { type: "button", className: "link", textContent: "Ask again" });
      retry.addEventListener("click", this.again);
      this.foot.before(el("div", { className: "failed", role: "alert" }, el("span", { textContent: error.message }), retry));
      this.box.hidden = !this.text;
    }
    const counted = this.made == null ? "" : `${this.made} tokens`;
    const ended = { length: "cut off at max tokens", stopped: "stopped", kept: "kept from before, not asked now" }[finish] ?? "";
    for (const text of [counted, ended]) if (text) this.foot.append(el("span", { textContent: text }));
    if (this.tokens.layers) this.offerMap();
  }

  /** A button that opens and closes the map of what was read. */
  offerMap() {
    const button = el("button", { type: "button", className: "link", textContent: "Map", ariaExpanded: "false", title: "Layers × tokens" });
    button.addEventListener("click", () => {
      this.map?.root.remove();
      this.map = this.map ? null : new HeatMap(this.read, this.pick);
      if (this.map) this.foot.after(this.map.root);
      button.ariaExpanded = String(Boolean(this.map));
    });
    this.foot.append(button);
  }

  /** The receipt's entries as chips; `isNew` tells a digest that is another one than this chat saw before. */
  showReceipt(receipt, isNew) {
    this.receipt = receipt;
    if (receipt === null) this.foot.append(el("span", { className: "chip", textContent: "no receipt" }));
    else if (!receipt.length) this.foot.append(el("span", { className: "chip", title: "X-Steer-Applied: []", textContent: "nothing applied" }));
    for (const entry of receipt ?? []) {
      const title = `X-Steer-Applied: ${JSON.stringify(entry)}`;
      this.foot.append(el("span", { className: "chip", title }, el("b", { textContent: entry.direction }), el("span", { textContent: entry.mode.replaceAll("_", "-") }),
        el("span", { textContent: shown(entry.strength) }), ...(entry.norm_preserving ? [el("span", { textContent: "norm kept" })] : []), ...(entry.shift ? [el("span", { textContent: `^${shown(entry.shift)}` })] : []), ...[entry.layers, entry.tokens].filter(Boolean).map((at) => el("span", { textContent: `@${at}` })), ...(entry.if ? [el("span", { textContent: conditional(entry.if) })] : []), el("code", { textContent: entry.digest.slice(0, 8) })));
      if (isNew(entry)) this.foot.append(el("span", { className: "chip new", textContent: "new version" }));
    }
  }
}

const conditional = ({ direction, layer, above, below, each }) => `?${each ? "each:" : ""}${direction}@${layer}${above === undefined ? "<" : ">"}${shown(above ?? below)}`;

export class Chat {
  /** `body(side, messages)` makes a request's body; `readout` says what became of the wish for one; `changed` is called
   * when answers begin and end; `pick` chooses the layer that colours show. `words`: are messages
   * read too; `differ`: is marked what differs; `markdown`: are answers rendered? */
  constructor({ body, readout, changed, pick }) {
    Object.assign(this, { body, readout, changed, pick, words: false, differ: false, markdown: false });
    this.turns = [];
    this.seen = new Map();
    this.repaint = perFrame(() => this.paint());
  }

  get running() {
    return this.turns.some((turn) => SIDES.some((side) => turn[side]?.running));
  }

  get last() {
    return this.turns.at(-1);
  }

  clear() {
    this.stop();
    this.turns = [];
    $("turns").replaceChildren();
    $("empty").hidden = false;
  }

  stop() {
    for (const turn of this.turns) for (const side of SIDES) turn[side]?.abort.abort();
  }

  /** What a side said and heard before turn `index`, and the message of that turn. A turn that failed is left out. */
  messages(side, index) {
    const before = this.turns.slice(0, index).filter((turn) => turn[side]?.text);
    return [...before.flatMap((turn) => [{ role: "user", content: turn.message }, { role: "assistant", content: turn[side].text }]),
      { role: "user", content: this.turns[index].message }];
  }

  /** Show turns as they were kept, without asking. */
  restore(turns) {
    this.clear();
    for (const { message, receipt, ...texts } of turns) {
      const turn = this.turn(message), index = this.turns.length - 1;
      for (const side of SIDES.filter((name) => texts[name])) {
        const answer = turn[side] = this.answer(side, index);
        turn.pair.append(answer.root);
        answer.tokens.add({ delta: { content: texts[side] } });
        answer.end("kept");
      }
      if (turn.steered) turn.steered.receipt = receipt;
    }
    this.repaint();
  }

  /** The turns as they are kept. */
  get said() {
    return this.turns.map(({ message, plain, steered }) => ({ message, plain: plain?.text ?? "", steered: steered?.text ?? "", receipt: steered?.receipt ?? null }));
  }

  send(message, sides) {
    const turn = this.turn(message);
    for (const side of sides) this.ask(side, this.turns.length - 1);
    turn.root.scrollIntoView({ block: "start", behavior: "smooth" });
  }

  turn(message) {
    $("empty").hidden = true;
    const turn = { message, pair: el("div", { className: "pair" }), box: el("p", { textContent: message, title: "You" }), read: null };
    turn.root = el("article", {}, el("div", { className: "asked" }, turn.box), turn.pair);
    this.turns.push(turn);
    $("turns").append(turn.root);
    return turn;
  }

  answer(side, index) {
    const read = () => (this.turns[index]?.read ? [this.turns[index].read] : []);
    return new Answer(side, { again: () => this.ask(side, index), read, pick: this.pick });
  }

  /** Ask the last message again on one side; what is there goes. */
  again(side) {
    if (this.last) this.ask(side, this.turns.length - 1);
  }

  async ask(side, index) {
    const turn = this.turns[index], old = turn[side], answer = this.answer(side, index);
    old?.abort.abort();
    turn[side] = answer;
    if (old) answer.root.style.setProperty("min-height", `${old.root.offsetHeight}px`); // nothing below jumps
    if (old) old.root.replaceWith(answer.root);
    else turn.pair.append(answer.root);
    this.changed();
    let finish = null, error = null;
    try {
      const body = this.body(side, this.messages(side, index));
      const response = await this.post(body, answer.abort.signal);
      const receipt = JSON.parse(response.headers.get("x-steer-applied") ?? "null");
      answer.showReceipt(receipt, (entry) => this.isNew(entry));
      for await (const event of events(response)) {
        if (event.usage) answer.made = event.usage.completion_tokens;
        for (const choice of event.choices ?? []) {
          answer.tokens.add(choice);
          finish = choice.finish_reason ?? finish;
        }
        this.repaint();
        this.follow();
      }
      if (body.steer_readout && answer.made && !answer.tokens.layers) this.readout("This server ignores the read-out, so tokens have no colours.");
    } catch (caught) {
      if (caught.name === "AbortError") finish = "stopped";
      else error = caught;
      if (error && !(error instanceof Problem)) console.error(error);
    }
    answer.end(finish, error);
    if (this.turns[index] !== turn) { this.changed(); return; } // another chat is shown now
    if (this.words) this.readWords();
    this.repaint();
    this.changed(answer);
  }

  /** Send, with the read-out if it can be had: a server that refuses it is asked again without. */
  async post(body, signal) {
    try {
      return await post(ROUTE, body, signal);
    } catch (error) {
      if (!body.steer_readout || error.param !== "steer_readout") throw error;
      this.readout(`Tokens have no colours: ${error.message.replace(/^steer_readout: /, "")}.`);
      body.steer_readout = undefined;
      return post(ROUTE, body, signal);
    }
  }

  /** Read the messages that are not read yet: what the plain stream carries at the end of each word, which is what a
   * request reads that ends there. */
  async readWords() {
    for (const [index, turn] of this.turns.entries()) {
      const { steer_readout } = this.body("plain", []), names = steer_readout?.directions.join();
      if (!names || this.running || (turn.read && turn.read.names === names)) continue;
      const words = turn.message.match(/\s*\S+/g), skipped = Math.max(0, words.length - MOST_WORDS);
      const tokens = Object.assign(new Tokens(turn.box), { names });
      turn.read = tokens;
      tokens.waiting.textContent = turn.message;
      try {
        const before = this.messages("plain", index).slice(0, -1);
        const reports = [];
        await inTurns([...words.keys()].slice(skipped), async (i) => {
          const content = words.slice(0, i + 1).join("");
          const body = { ...this.body("plain", [...before, { role: "user", content }]), stream: undefined, stream_options: undefined, max_tokens: 1, ignore_eos: true, add_generation_prompt: false, continue_final_message: true };
          reports[i] = (await (await post(ROUTE, body)).json()).choices[0].steer_readout;
        });
        tokens.waiting.textContent = "";
        tokens.waiting.before(words.slice(0, skipped).join(""));
        reports.forEach((report, i) => tokens.put(words[i], words[i].trim(), report, 0));
        tokens.waiting.before(turn.message.slice(words.join("").length));
      } catch (error) {
        turn.read = null;
        if (!(error instanceof Problem)) throw error;
        this.wordless(`Your messages have no colours: ${error.message}`);
      }
      this.repaint();
    }
  }

  isNew({ direction, digest }) {
    const before = this.seen.get(direction);
    this.seen.set(direction, digest);
    return before !== undefined && before !== digest;
  }

  /** Mark the words that the two sides of a turn do not share, or nothing. */
  mark() {
    const box = this.markdown ? "formatted" : "box", both = this.turns.filter((turn) => turn.plain?.text && turn.steered?.text);
    const ranges = this.differ ? both.flatMap((turn) => differing(turn.plain[box], turn.steered[box])) : [];
    CSS.highlights?.set("differs", new Highlight(...ranges));
  }

  /** Keep the end in sight for who is there already. */
  follow() {
    const box = $("chat");
    if (box.scrollHeight - box.scrollTop - box.clientHeight < 80) box.scrollTop = box.scrollHeight;
  }

  paint() {
    const read = this.turns.flatMap((turn) => [turn.read, ...SIDES.map((side) => turn[side]?.tokens)]).filter(Boolean);
    const scale = scaleOf(read);
    for (const tokens of read) tokens.paint(scale);
    for (const answer of this.turns.flatMap((turn) => SIDES.map((side) => turn[side])).filter(Boolean)) {
      answer.map?.draw();
      if (this.markdown && !answer.running && answer.shown !== answer.text) {
        answer.formatted.replaceChildren(...rendered(answer.text));
        answer.shown = answer.text;
      }
    }
    if (!this.running) this.mark();
    this.painted?.(scale);
  }
}
