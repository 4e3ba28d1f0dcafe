// The page: what its parts have to do with one another.

import { hasKey, json, onUnauthorised, Problem, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { curl, python } from "./code.js";
import { Directions } from "./directions.js";
import { $, el, shown } from "./dom.js";
import { draw, facts } from "./profile.js";
import { Steering } from "./steering.js";
import { look } from "./tokens.js";

const LIVE_DELAY = 180;

let profile = null; // the layers of the direction in the controls, once they are here
let unread = null; // why this server gives no read-out for it
let started = false;
let drag; // the wait before a moving slider asks

const directions = new Directions(onDirections);
const steering = new Steering({ changed: steerAgain, picked: onPicked });
const chat = new Chat({ body, readout: noReadout, changed: onAnswer });
chat.painted = showLegend;

// -- requests --------------------------------------------------------------------------------------------------------

const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));

function body(side, messages) {
  const system = $("system").value.trim();
  return {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: number("temperature"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
    steer: side === "steered" ? steering.spec() : "off",
    steer_readout: steering.entry && !unread ? { directions: steering.names, layers: "all" } : undefined,
  };
}

function send(event) {
  event.preventDefault();
  const message = $("message").value.trim();
  if (!message || chat.running) return;
  $("message").value = "";
  chat.send(message, steering.entry ? ["plain", "steered"] : ["plain"]);
}

/** Ask the steered side again: at once, or where that is wanted while the slider moves. */
function steerAgain(final = true) {
  clearTimeout(drag);
  if (final) chat.again("steered");
  else if ($("live").checked) drag = setTimeout(() => chat.again("steered"), LIVE_DELAY);
}

function onAnswer(ended) {
  $("send").hidden = chat.running;
  $("stop").hidden = !chat.running;
  if (!ended) return;
  $("status").textContent = `${ended.side === "plain" ? "Plain" : "Steered"} answer: ${ended.text || "failed"}`;
  const listed = new Map(directions.items.map((item) => [item.id, item.digest]));
  if (ended.receipt?.some((entry) => listed.get(entry.direction) !== entry.digest)) refresh();
}

function noReadout(why) {
  unread = why;
  $("unread").textContent = why;
  $("unread").hidden = !why;
  $("reading").hidden = Boolean(why);
}

// -- the direction of the controls -------------------------------------------------------------------------------------

function onDirections(wanted) {
  const { may } = steering;
  const usable = may.steer && may.modes.length ? directions.served.filter((item) => item.usable !== false) : [];
  $("pickers").hidden = $("colours").hidden = !usable.length;
  $("none").hidden = Boolean(usable.length);
  $("none").textContent = whyNone();
  document.body.classList.toggle("alone", !usable.length);
  steering.list(usable, wanted);
  if (usable.length) return;
  profile = null;
  $("profile-section").hidden = true;
  $("summary").textContent = "";
}

/** Why nothing can be steered by, for who sees an empty list. */
function whyNone() {
  const { may } = steering, plain = "so only the plain side is asked.";
  if (!may.steer || !may.modes.length) return `This key may not steer, ${plain}`;
  if (directions.served.length) return `This key may use none of the directions, ${plain}`;
  if (may.manage) return `This server has no direction yet, ${plain} Add a direction file below.`;
  return hasKey() ? `There is no direction that this key may use, ${plain}` : `This server has no direction yet, ${plain}`;
}

/** What the list says is enough to ask with it; the profile follows. */
function onPicked(listed) {
  noReadout(steering.may.readout ? null : "This key may not read along directions, so tokens have no colours.");
  const same = look.name === listed.id;
  if (!same) look.row = 0;
  look.name = listed.id;
  $("row-field").hidden = listed.rank < 2;
  $("row").replaceChildren(...Array.from({ length: listed.rank }, (_, row) => el("option", { value: row, textContent: row })));
  $("row").value = look.row;
  loadProfile(listed, same).catch(notice);
}

async function loadProfile({ id, source_layer }, same) {
  const detail = await json(`/v1/directions/${encodeURIComponent(id)}`);
  if (look.name !== id) return; // another one was chosen in the meantime
  profile = detail.profile;
  steering.can(id, detail.meta.modes);
  const last = profile.length - 1;
  if (!same || look.layer > last) look.layer = source_layer ?? last;
  $("layer").max = last;
  $("profile-section").hidden = false;
  $("profile-name").textContent = id;
  $("facts").replaceChildren(...facts(detail));
  showLayer();
}

function showLayer() {
  $("layer").value = look.layer;
  $("layer-text").textContent = `${look.layer}${look.layer === steering.listed?.source_layer ? ", the source" : ""}`;
  if (profile) draw($("profile"), profile, look.layer, setLayer);
  chat.repaint();
}

function setLayer(layer) {
  look.layer = layer;
  showLayer();
}

function showLegend(scale) {
  const text = scale === null ? "" : look.relative ? `${shown(100 * scale)} %` : shown(scale);
  $("low").textContent = text && `−${text}`;
  $("high").textContent = text && `+${text}`;
}

// -- dialogs -------------------------------------------------------------------------------------------------------------

/** Open the key dialog and wait for its end: a key, or null. */
function askKey(why) {
  const dialog = $("key-dialog");
  $("key-why").textContent = why;
  $("key-value").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "ok" ? $("key-value").value.trim() : null);
      $("key-value").value = "";
    }, { once: true });
  });
}

function showCode() {
  const message = $("message").value.trim();
  const turns = chat.turns.length;
  const messages = message || !turns ? [...history(turns), { role: "user", content: message || "Hello!" }] : chat.messages("steered", turns - 1);
  const { stream_options, ...request } = body(steering.entry ? "steered" : "plain", messages);
  const language = document.querySelector("[name=language]:checked").value;
  const clean = JSON.parse(JSON.stringify(language === "python" ? { ...request, stream: undefined } : request));
  $("code").textContent = { curl, python }[language](location.origin, clean, hasKey());
  $("code-copy").textContent = "Copy";
}

/** The steered side's messages up to a new one. */
function history(turns) {
  return turns ? [...chat.messages("steered", turns - 1), { role: "assistant", content: chat.last.steered?.text ?? "" }].filter((m) => m.content) : [];
}

async function copyCode(event) {
  event.preventDefault();
  const select = () => getSelection().selectAllChildren($("code"));
  try {
    await navigator.clipboard.writeText($("code").textContent);
    $("code-copy").textContent = "Copied";
  } catch { // only secure pages may write there: the code is selected, and the user's own copy works
    select();
    $("code-copy").textContent = document.execCommand("copy") ? "Copied" : "Selected";
  }
}

// -- wiring --------------------------------------------------------------------------------------------------------------

function notice(error) {
  $("notice").hidden = !error;
  $("notice").textContent = error?.message ?? "";
}

async function refresh() {
  try {
    await directions.refresh();
    notice(null);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    notice(error);
  }
}

async function start() {
  try {
    steering.offer(await json("/v1/steering"));
    directions.managed = steering.may.manage;
    $("upload").hidden = !directions.managed;
    $("unmanaged").hidden = directions.managed;
    look.name = null;
    const cards = (await json("/v1/models")).data.filter((card) => !card.parent);
    $("model").replaceChildren(...cards.map((card) => el("option", { value: card.id, textContent: card.id })));
    const room = cards[0]?.max_model_len;
    if (room) $("max-tokens").value = Math.min(256, Math.floor(room / 2));
    await refresh();
    started = true;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    notice(error);
  }
  $("message").focus();
}

function wire() {
  $("composer").addEventListener("submit", send);
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  if (!CSS.supports("field-sizing", "content")) { // where the style sheet alone does not make it grow
    $("message").addEventListener("input", () => { $("message").rows = Math.min(10, $("message").value.split("\n").length); });
  }
  $("stop").addEventListener("click", () => chat.stop());
  $("fresh").addEventListener("click", () => { chat.clear(); $("message").focus(); });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    chat.stop();
    toggleControls(false);
  });

  for (const button of document.querySelectorAll("#examples button")) {
    button.addEventListener("click", (event) => { $("message").value = button.textContent; send(event); $("message").focus(); });
  }
  for (const input of document.querySelectorAll("[name=view]")) {
    input.addEventListener("change", () => { look.view = input.value; chat.repaint(); });
  }
  $("layer").addEventListener("input", () => setLayer(Number($("layer").value)));
  $("row").addEventListener("change", () => { look.row = Number($("row").value); chat.repaint(); });
  $("relative").addEventListener("change", () => { look.relative = $("relative").checked; chat.repaint(); });

  onUnauthorised(askKey);
  $("key").addEventListener("click", async () => {
    const given = await askKey(hasKey() ? "A key is set. A new one takes its place; an empty one removes it." : "Requests carry no key now.");
    if (given !== null) { setKey(given); start(); }
  });
  $("key-dialog").querySelector("form").addEventListener("submit", (event) => { event.preventDefault(); $("key-dialog").close("ok"); });
  for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close(""));

  $("copy").addEventListener("click", () => { showCode(); $("code-dialog").showModal(); });
  for (const input of document.querySelectorAll("[name=language]")) input.addEventListener("change", showCode);
  $("code-dialog").querySelector("form").addEventListener("submit", copyCode);

  $("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
    setTheme(now === "dark" ? "light" : "dark");
  });
  $("open").addEventListener("click", () => toggleControls());
  document.querySelector("main").addEventListener("pointerdown", () => toggleControls(false));
  addEventListener("focus", () => { if (started) refresh(); }); // files may have been put in the meantime
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("theme", theme); } catch { /* it lasts as long as the page then */ }
}

function toggleControls(open) {
  $("open").setAttribute("aria-expanded", document.body.classList.toggle("controls-open", open));
}

wire();
start();
