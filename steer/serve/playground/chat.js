// The conversation: turns of one message with an answer on each side, each side with its own history.

import { events, post, Problem } from "./api.js";
import { $, el, perFrame, shown } from "./dom.js";
import { scaleOf, Tokens } from "./tokens.js";

export const SIDES = ["plain", "steered"];
const ROUTE = "/v1/chat/completions";

/** One answer on one side, from its first token to its receipt. `again` asks for another in its place. */
class Answer {
  constructor(side, again) {
    this.side = side;
    this.again = again;
    this.abort = new AbortController();
    this.running = true;
    this.box = el("div", { className: "text" });
    this.foot = el("div", { className: "foot" });
    this.root = el("div", { className: `side ${side}` }, el("h4", {}, el("i"), side === "plain" ? "Plain" : "Steered"), this.box, this.foot);
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
    const ended = { length: "cut off at max tokens", stopped: "stopped" }[finish] ?? "";
    for (const text of [counted, ended]) if (text) this.foot.append(el("span", { textContent: text }));
  }

  /** The receipt's entries as chips; `isNew` tells a digest that is another one than this chat saw before. */
  showReceipt(receipt, isNew) {
    this.receipt = receipt;
    if (receipt === null) this.foot.append(el("span", { className: "chip", textContent: "no receipt" }));
    else if (!receipt.length) this.foot.append(el("span", { className: "chip", title: "X-Steer-Applied: []", textContent: "nothing applied" }));
    for (const entry of receipt ?? []) {
      const title = `X-Steer-Applied: ${JSON.stringify(entry)}`;
      this.foot.append(el("span", { className: "chip", title }, el("b", { textContent: entry.direction }), el("span", { textContent: entry.mode.replace("_", "-") }),
        el("span", { textContent: shown(entry.strength) }), ...[entry.layers, entry.tokens].filter(Boolean).map((at) => el("span", { textContent: `@${at}` })), el("code", { textContent: entry.digest.slice(0, 8) })));
      if (isNew(entry)) this.foot.append(el("span", { className: "chip new", textContent: "new version" }));
    }
  }
}

export class Chat {
  /** `body(side, messages)` makes a request's body; `readout` says what became of the wish for one; `changed` is called
   * when answers begin and end. */
  constructor({ body, readout, changed }) {
    Object.assign(this, { body, readout, changed });
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

  send(message, sides) {
    $("empty").hidden = true;
    const turn = { message, pair: el("div", { className: "pair" }) };
    turn.root = el("article", {}, el("div", { className: "asked" }, el("p", { textContent: message, title: "You" })), turn.pair);
    this.turns.push(turn);
    $("turns").append(turn.root);
    for (const side of sides) this.ask(side, this.turns.length - 1);
    turn.root.scrollIntoView({ block: "start", behavior: "smooth" });
  }

  /** Ask the last message again on one side; what is there goes. */
  again(side) {
    if (this.last) this.ask(side, this.turns.length - 1);
  }

  async ask(side, index) {
    const turn = this.turns[index], old = turn[side], answer = new Answer(side, () => this.ask(side, index));
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

  isNew({ direction, digest }) {
    const before = this.seen.get(direction);
    this.seen.set(direction, digest);
    return before !== undefined && before !== digest;
  }

  /** Keep the end in sight for who is there already. */
  follow() {
    const box = $("chat");
    if (box.scrollHeight - box.scrollTop - box.clientHeight < 80) box.scrollTop = box.scrollHeight;
  }

  paint() {
    const answers = this.turns.flatMap((turn) => SIDES.map((side) => turn[side]?.tokens).filter(Boolean));
    const scale = scaleOf(answers);
    for (const tokens of answers) tokens.paint(scale);
    this.painted?.(scale);
  }
}
