// The server as any client sees it: JSON, streams, and errors in its own words.

const AT_ONCE = 4;

let key = "";

/** Called on a 401 with the server's message; resolves to a key, or to null when the user gives none. */
let askForKey = async () => null;
let asking = null;

export const hasKey = () => key !== "";
export const setKey = (value) => { key = value; };

/** A mark of this key and of `text`, 64 bits (FNV-1a): too few to find a key by, and the same without a secure page. */
export function mark(text) {
  const hash = [...new TextEncoder().encode(`${text}\n${key}`)].reduce((sum, byte) => BigInt.asUintN(64, (sum ^ BigInt(byte)) * 0x100000001b3n), 0xcbf29ce484222325n);
  return hash.toString(16);
}
export const onUnauthorised = (ask) => { askForKey = ask; };

export class Problem extends Error {
  constructor(status, { message, param = null, code = null, problems = [] }) {
    super(message);
    Object.assign(this, { status, param, code, problems });
  }
}

/** A response that is ok. Throws Problem; a 401 asks for a key first, once for all calls that wait for one. */
export async function call(path, options = {}) {
  for (;;) {
    const sent = key;
    const headers = { ...options.headers, ...(sent && { Authorization: `Bearer ${sent}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(0, { message: "The server cannot be reached." });
    }
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (response.status !== 401) throw problem;
    if (key !== sent) continue; // another call has got a key in the meantime
    asking ??= askForKey(problem.message).finally(() => { asking = null; });
    const given = await asking;
    if (given === null) throw problem;
    key = given;
  }
}

export const json = async (path, options) => (await call(path, options)).json();

export function post(path, body, signal) {
  return call(path, { method: "POST", body: JSON.stringify(body), signal, headers: { "Content-Type": "application/json" } });
}

/** Call `ask` for each item of `queue` until it is empty, few at once so that other users of the key have room. What is
 * left is not asked for once one throws. */
export async function inTurns(queue, ask) {
  const work = async () => { while (queue.length) await ask(queue.shift()); };
  try {
    await Promise.all(Array.from({ length: AT_ONCE }, work));
  } finally { queue.length = 0; }
}

/** The JSON of each event of a streamed response. Throws Problem for an error that comes in the middle, and for an end before
 * the last event. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Problem(0, { message: "The connection to the server was lost: the answer is not whole." });
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Problem(response.status, event.error);
      yield event;
    }
  }
}

async function problemOf(response) {
  const text = await response.text();
  try {
    const { error, detail } = JSON.parse(text);
    if (error?.message) return new Problem(response.status, error);
    if (typeof error === "string" || typeof detail === "string") return new Problem(response.status, { message: error ?? detail });
  } catch { /* not JSON: shown as it is */ }
  return new Problem(response.status, { message: text.trim().slice(0, 500) || `The server answered with status ${response.status}.` });
}
