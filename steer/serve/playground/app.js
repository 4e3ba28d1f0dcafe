// The page: settings and what hangs on them. Nothing is kept anywhere but in this page, except the theme.

import { hasKey, json, onUnauthorised, Problem, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { curl, python } from "./code.js";
import { Directions } from "./directions.js";
import { $, el, shown } from "./dom.js";
import { draw, facts } from "./profile.js";
import { look } from "./tokens.js";

const LIVE_DELAY = 180;

let direction = null; // the chosen one, as it is listed
let profile = null; // its layers, once they are here
let unread = null; // why this server gives no read-out for it
let modes = {}, tokens = {}; // what each does, and which tokens each name means, as the server says
let may = { steer: true, readout: true, manage: true, modes: [], max_strength: 10 }; // this key, or nobody's
let started = false;

const directions = new Directions(onDirections);
const chat = new Chat({ body, readout: noReadout, changed: onAnswer });
chat.painted = showLegend;

// -- requests --------------------------------------------------------------------------------------------------------

const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
const strength = () => Number($("number").value);

/** At which layers and tokens, where that is not all. */
function where() {
  const said = { layers: $("layers").value.trim(), tokens: $("tokens").value.trim() };
  return Object.fromEntries(Object.entries(said).filter(([, value]) => value && value !== "all"));
}

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
    steer: side === "steered" && direction ? { direction: direction.id, mode: $("mode").value, strength: strength(), ...where() } : "off",
    steer_readout: direction && !unread ? { directions: [direction.id], layers: "all" } : undefined,
  };
}

function send(event) {
  event.preventDefault();
  const message = $("message").value.trim();
  if (!message || chat.running) return;
  $("message").value = "";
  chat.send(message, direction ? ["plain", "steered"] : ["plain"]);
}

function steerAgain() {
  showSummary();
  if (direction) chat.again("steered");
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

// -- the chosen direction ----------------------------------------------------------------------------------------------

function onDirections(wanted) {
  const names = may.steer && may.modes.length ? directions.served.filter((item) => item.usable !== false).map((item) => item.id) : [];
  const chosen = [wanted, $("direction").value, names[0]].find((name) => names.includes(name));
  $("direction").replaceChildren(...names.map((name) => el("option", { value: name, textContent: name })));
  $("pickers").hidden = $("colours").hidden = !names.length;
  $("none").hidden = Boolean(names.length);
  $("none").textContent = whyNone();
  document.body.classList.toggle("alone", !names.length);
  const listed = directions.items.find((item) => item.id === chosen);
  if (!listed) {
    direction = profile = null;
    $("profile-section").hidden = true;
    return;
  }
  $("direction").value = chosen;
  if (direction?.id !== chosen || direction.digest !== listed.digest) choose(listed);
}

/** Why nothing can be steered by, for who sees an empty list. */
function whyNone() {
  const plain = "so only the plain side is asked.";
  if (!may.steer || !may.modes.length) return `This key may not steer, ${plain}`;
  if (directions.served.length) return `This key may use none of the directions, ${plain}`;
  if (may.manage) return `This server has no direction yet, ${plain} Add a direction file below.`;
  return hasKey() ? `There is no direction that this key may use, ${plain}` : `This server has no direction yet, ${plain}`;
}

/** What the list says is enough to ask with it; the profile follows. */
function choose(listed) {
  const same = direction?.id === listed.id;
  direction = listed;
  noReadout(may.readout ? null : "This key may not read along directions, so tokens have no colours.");
  if (!same) toDefault();
  look.row = 0;
  $("row-field").hidden = listed.rank < 2;
  $("row").replaceChildren(...Array.from({ length: listed.rank }, (_, row) => el("option", { value: row, textContent: row })));
  showSummary();
  loadProfile(listed, same).catch(notice);
}

async function loadProfile({ id, source_layer }, same) {
  const detail = await json(`/v1/directions/${encodeURIComponent(id)}`);
  if (direction?.id !== id) return; // another one was chosen in the meantime
  profile = detail.profile;
  const last = profile.length - 1;
  if (!same || look.layer > last) look.layer = source_layer ?? last;
  $("layer").max = last;
  $("profile-section").hidden = false;
  $("profile-name").textContent = id;
  $("facts").replaceChildren(...facts(detail));
  showLayer();
}

function toDefault() {
  $("mode").value = may.modes.includes(direction.mode) ? direction.mode : may.modes[0];
  $("number").value = $("strength").value = Math.max(-may.max_strength, Math.min(may.max_strength, direction.strength));
  $("ticks").replaceChildren(...[0, 1, direction.strength].map((value) => el("option", { value })));
  $("layers").value = $("tokens").value = "";
  showSummary();
}

function showSummary() {
  $("summary").textContent = direction ? [`${direction.id}, ${$("mode").value.replace("_", "-")} at ${shown(strength())}`, ...Object.entries(where()).map((each) => each.join(" "))].join(", ") : "";
  $("mode-text").textContent = modes[$("mode").value] ?? "";
  const said = tokens[$("tokens").value.trim().replace(/-\d+$/, "-N")] ?? "";
  $("tokens-text").hidden = !said;
  $("tokens-text").textContent = said;
}

function showLayer() {
  $("layer").value = look.layer;
  $("layer-text").textContent = `${look.layer}${look.layer === direction?.source_layer ? ", the source" : ""}`;
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
  const { stream_options, ...request } = body(direction ? "steered" : "plain", messages);
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

/** What the key may not do is not offered. */
function showRights() {
  $("tokens-known").replaceChildren(...Object.keys(tokens).map((name) => el("option", { value: name.replace("N", "1") })));
  $("mode").replaceChildren(...may.modes.map((mode) => el("option", { value: mode, textContent: mode.replaceAll("_", "-") })));
  $("number").min = -may.max_strength;
  $("number").max = may.max_strength;
  $("strength").min = Math.max(-2, -may.max_strength);
  $("strength").max = Math.min(3, may.max_strength);
  const [low, high] = [Number($("strength").min), Number($("strength").max)];
  for (const span of document.querySelectorAll(".scale span")) {
    const at = (Number(span.dataset.at) - low) / (high - low);
    span.hidden = !(at >= 0 && at <= 1);
    span.style.setProperty("left", `${at * 100}%`);
  }
  $("upload").hidden = !may.manage;
  $("unmanaged").hidden = may.manage;
  directions.managed = may.manage;
}

async function start() {
  try {
    ({ modes, tokens, may } = await json("/v1/steering"));
    showRights();
    direction = null; // chosen anew: another key may have other rights
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

let drag;
function onStrength(value, final) {
  $("number").value = value;
  showSummary();
  clearTimeout(drag);
  if (final) steerAgain();
  else if ($("live").checked) drag = setTimeout(steerAgain, LIVE_DELAY);
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

  $("direction").addEventListener("change", () => {
    choose(directions.items.find((item) => item.id === $("direction").value));
    steerAgain();
  });
  for (const id of ["mode", "layers", "tokens"]) $(id).addEventListener("change", steerAgain);
  $("strength").addEventListener("input", () => onStrength($("strength").value, false));
  $("strength").addEventListener("change", () => onStrength($("strength").value, true));
  $("number").addEventListener("change", () => { $("strength").value = $("number").value; onStrength($("number").value || "0", true); });
  $("default").addEventListener("click", () => { toDefault(); steerAgain(); });

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
