// Conversations that are kept: in this browser's storage where the user wants that, in a file, or in a link. None of it
// goes to the server: what stands behind the # of an address is sent to nobody.

import { mark } from "./api.js";

const MOST = 30;
const PREFIX = "#chat=";

let models = "";
/** Where the chats of this server and key are, once the user wants to keep some. */
const place = () => `chats ${mark(models)}`;

/** Use the place of a server with these models. */
export function at(served) {
  models = served.join();
  for (const old of ["chats", "keep-no-chats"]) write(old, null); // of versions that kept chats unasked
}

/** All that are kept, the newest first. */
export function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(place()) ?? "[]");
    return Array.isArray(found) ? found.map(checked).filter(Boolean) : [];
  } catch { return []; } // storage is off, or another's
}

function write(key, value) {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
    return true;
  } catch { return false; } // off or full: it lasts as long as the page then
}

/** Keep a chat in which something was answered. */
export function keep(chat) {
  if (!keeping() || !chat.turns.some(({ plain, steered }) => plain || steered)) return;
  const all = [chat, ...kept().filter(({ id }) => id !== chat.id)].slice(0, MOST);
  while (all.length && !write(place(), JSON.stringify(all))) all.pop(); // the oldest makes room
}

/** Forget the chat `id`, or all. */
export function forget(id) {
  if (keeping()) write(place(), JSON.stringify(id ? kept().filter((chat) => chat.id !== id) : []));
}

export function keeping() {
  try { return localStorage.getItem(place()) !== null; } catch { return false; }
}

export function setKeeping(wanted) {
  write(place(), wanted ? "[]" : null);
}

/** An address that holds the chat; receipts stay out, since nobody could tell that they are the server's. */
export function linkOf(chat) {
  const turns = chat.turns.map(({ receipt, ...turn }) => turn), bytes = new TextEncoder().encode(JSON.stringify({ ...chat, turns }));
  const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  return `${location.origin}${location.pathname}${PREFIX}${text.replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "")}`;
}

/** The chat of a link's fragment: null where it is broken, undefined where it is no link to a chat. */
export function linked(fragment) {
  if (!fragment.startsWith(PREFIX)) return undefined;
  try {
    const text = atob(fragment.slice(PREFIX.length).replaceAll("-", "+").replaceAll("_", "/"));
    return parsed(new TextDecoder().decode(Uint8Array.from(text, (c) => c.charCodeAt(0))));
  } catch { return null; }
}

/** The chat of a JSON text, without its receipts; null where it is none. */
export function parsed(text) {
  try {
    const chat = checked(JSON.parse(text));
    return chat && { ...chat, id: newId(), turns: chat.turns.map((turn) => ({ ...turn, receipt: null })) };
  } catch { return null; }
}

export const newId = () => Date.now().toString(36);

/** A chat with what belongs to one and nothing else: links and storage may hold anything. */
function checked(value) {
  if (!Array.isArray(value?.turns)) return null;
  const text = (given) => (typeof given === "string" ? given : ""), number = (given) => (Number.isFinite(given) ? given : undefined);
  const spans = ({ layers, tokens, if: condition, shift, norm_preserving }) => ({ layers: text(layers), tokens: text(tokens), if: text(condition), shift: text(shift), norm_preserving: text(norm_preserving) });
  const entries = (Array.isArray(value.steer) ? value.steer : []).filter((entry) => typeof entry?.direction === "string" && Number.isFinite(entry.strength));
  return {
    id: text(value.id) || newId(),
    system: text(value.system),
    ...Object.fromEntries(["temperature", "max_tokens", "seed"].map((name) => [name, number(value[name])])),
    steer: entries.map(({ direction, mode, strength, ...rest }) => ({ direction, mode: text(mode), strength, ...spans(rest) })),
    turns: value.turns.filter((turn) => text(turn?.message)).map(({ message, plain, steered, receipt }) => ({ message, plain: text(plain), steered: text(steered), receipt: receipt ?? null })),
  };
}
