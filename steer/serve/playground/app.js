// The page: what its parts have to do with one another.

import { hasKey, json, onUnauthorised, Problem, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { curl, python } from "./code.js";
import { Directions } from "./directions.js";
import { $, el, shown } from "./dom.js";
import { draw, facts } from "./profile.js";
import { Steering } from "./steering.js";
import * as store from "./store.js";
import * as sweep from "./sweep.js";
import { look } from "./tokens.js";

const LIVE_DELAY = 180;

let profile = null; // the layers of the direction in the controls, once they are here
let unread = null; // why this server gives no read-out for it
let started = false;
let chatId = store.newId();
let swept = null; // what the last sweep found
let drag; // the wait before a moving slider asks

const directions = new Directions(onDirections);
const steering = new Steering({ changed: steerAgain, picked: onPicked });
const chat = new Chat({ body, readout: noReadout, changed: onAnswer, pick: setLayer });
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
  showSweep();
  clearTimeout(drag);
  if (final) chat.again("steered");
  else if ($("live").checked) drag = setTimeout(() => chat.again("steered"), LIVE_DELAY);
}

/** Measure the last message over the slider's range. */
async function startSweep() {
  $("sweep-text").textContent = chat.last ? "Measuring…" : "Ask something first: the last message is measured.";
  if (!chat.last) return;
  const messages = chat.messages("steered", chat.turns.length - 1), ask = (strength) => ({ ...body("plain", messages), steer: strength === null ? "off" : steering.spec(strength) });
  const what = JSON.stringify([ask(0), steering.usable.map((item) => item.digest)]), known = swept?.refused && swept.what === what ? swept.known : new Map();
  $("sweep-start").disabled = true;
  try {
    swept = { what, ...await sweep.measure(ask, steering.range, known) };
    showSweep();
  } finally {
    $("sweep-start").disabled = false;
  }
}

function showSweep() {
  const words = $("sweep-words").value.split(",").map((word) => word.trim()).filter(Boolean);
  if (swept) sweep.draw(swept, words, steering.entry?.strength ?? 0, (strength) => steering.set({ strength }));
}

// -- conversations that are kept -------------------------------------------------------------------------------------------

/** This conversation with its settings. */
function current() {
  return { id: chatId, system: $("system").value, temperature: number("temperature"), max_tokens: number("max-tokens"), seed: number("seed"), steer: steering.entries, turns: chat.said };
}

function openChat(kept) {
  leave();
  chatId = kept.id;
  $("system").value = kept.system;
  for (const id of ["temperature", "max-tokens", "seed"]) $(id).value = kept[id.replace("-", "_")] ?? "";
  const missing = steering.restore(kept.steer);
  notice(missing.length ? new Error(`Not served here as it was: ${missing.join(", ")}. The conversation is shown as it was.`) : null);
  chat.restore(kept.turns);
  showChats();
}

/** Before another chat is shown: what was answered so far is kept. */
function leave() {
  if (chat.running) store.keep(current());
}

function fresh() {
  leave();
  chat.clear();
  chatId = store.newId();
  showChats();
  $("message").focus();
}

function openLink() {
  const shared = store.linked(location.hash);
  if (shared === undefined) return;
  window.history.replaceState(null, "", location.pathname); // a reload is a new start
  openOther(shared, "linked", "This link holds no chat: it was cut short or changed.");
}

/** Open the file that "Export as JSON" wrote. */
async function importChat() {
  const [file] = $("exported").files;
  if (file) openOther(store.parsed(await file.text()), "exported", `${file.name} holds no chat; accepted: a file of “Export as JSON”.`);
  $("exported").value = "";
}

/** Open a chat that came from elsewhere, or say why there is none. */
function openOther(other, kind, why) {
  if (!other) notice(new Error(why));
  else if (!chat.last || confirm(`Show the ${kind} chat in place of this one?`)) openChat(other);
}

function showChats() {
  $("keep").checked = store.keeping();
  $("forget").hidden = !store.kept().length;
  $("chats").replaceChildren(...store.kept().map((kept) => {
    const title = kept.turns[0]?.message ?? "(empty)", open = el("button", { type: "button", className: "quiet", textContent: title, title });
    const remove = el("button", { type: "button", className: "quiet", textContent: "Delete", ariaLabel: `Delete the chat “${title}”` });
    if (kept.id === chatId) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => openChat(kept));
    remove.addEventListener("click", () => { store.forget(kept.id); showChats(); });
    return el("li", {}, open, remove);
  }));
}

function exportChat() {
  const href = URL.createObjectURL(new Blob([JSON.stringify(current(), null, 2)], { type: "application/json" }));
  el("a", { href, download: `steer-chat-${chatId}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

async function copyLink() {
  const link = store.linkOf(current());
  $("link").value = link;
  $("link").hidden = false;
  $("link").select();
  try { await navigator.clipboard.writeText(link); } catch { document.execCommand("copy"); } // selected in any case
}

function onAnswer(ended) {
  $("send").hidden = chat.running;
  $("stop").hidden = !chat.running;
  if (!ended) return;
  $("status").textContent = `${ended.side === "plain" ? "Plain" : "Steered"} answer: ${ended.text || "failed"}`;
  if (!chat.running) { store.keep(current()); showChats(); }
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
  const usable = may.steer ? directions.served.filter((item) => item.usable !== false && steering.modesOf(item).length) : [];
  $("pickers").hidden = $("reads").hidden = $("sweep").hidden = !usable.length;
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
  if (!may.steer || !may.modes.length || !may.tokens.length) return `This key may not steer, ${plain}`;
  if (directions.served.length) return `This key may use none of the directions, ${plain}`;
  if (may.manage) return `This server has no direction yet, ${plain} Add a direction file below.`;
  return hasKey() ? `There is no direction that this key may use, ${plain}` : `This server has no direction yet, ${plain}`;
}

/** What the list says is enough to ask with it; the profile follows. */
function onPicked(listed) {
  noReadout(steering.may.readout ? null : "This key may not read along directions, so tokens have no colours.");
  const same = look.name === listed.id;
  if (!same) { look.row = 0; swept = null; $("sweep-charts").replaceChildren(); $("sweep-text").textContent = ""; }
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
    store.at(cards.map((card) => card.id));
    const room = cards[0]?.max_model_len;
    if (room) $("max-tokens").value = Math.min(256, Math.floor(room / 2));
    await refresh();
    started = true;
    showChats();
    openLink();
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
  $("fresh").addEventListener("click", fresh);
  $("sweep-start").addEventListener("click", startSweep);
  $("sweep-words").addEventListener("change", showSweep);
  $("export").addEventListener("click", exportChat);
  $("share").addEventListener("click", copyLink);
  $("import").addEventListener("click", () => $("exported").click());
  $("exported").addEventListener("change", importChat);
  $("keep").addEventListener("change", () => { store.setKeeping($("keep").checked); if (!chat.running) store.keep(current()); showChats(); });
  $("forget").addEventListener("click", () => { store.forget(); showChats(); });
  addEventListener("hashchange", openLink);
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

  $("words").addEventListener("change", () => { chat.words = $("words").checked; $("wordless").hidden = true; if (chat.words) chat.readWords(); });
  $("differ").parentElement.hidden = !CSS.highlights;
  for (const id of ["differ", "markdown"]) {
    $(id).addEventListener("change", () => {
      chat[id] = $(id).checked;
      document.body.classList.toggle("markdown", chat.markdown);
      chat.repaint();
    });
  }
  chat.wordless = (why) => { $("wordless").textContent = why; $("wordless").hidden = false; };

  onUnauthorised(askKey);
  $("key").addEventListener("click", async () => {
    const given = await askKey(hasKey() ? "A key is set. A new one takes its place; an empty one removes it." : "Requests carry no key now.");
    if (given !== null) { fresh(); setKey(given); start(); } // what one key was told is not kept for another
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
    chat.repaint(); // maps are painted in the theme's colours
  });
  $("open").addEventListener("click", () => toggleControls());
  addEventListener("focus", () => { if (started) refresh(); }); // files may have been put in the meantime
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("theme", theme); } catch { /* it lasts as long as the page then */ }
}

function toggleControls(open) {
  $("open").setAttribute("aria-expanded", document.body.classList.toggle("controls-open", open));
  chat.last?.pair.scrollIntoView({ block: "nearest" });
}

wire();
start();
