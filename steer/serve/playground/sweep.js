// A sweep: what the first token of the answer would be at many strengths, in one batch of the server's.

import { json } from "./api.js";
import { $, shown } from "./dom.js";
import { chart } from "./profile.js";

const STEPS = 12;
const LISTED = 20; // likeliest tokens: the most that servers list
const PLOTS = [
  { title: "Log-odds of these first words", lines: [["odds", ""]], zero: true },
  { title: "KL from the plain answer, nats", lines: [["kl", ""]], from: 0 },
];

/** Measure `strengths` and plain. `body(strength)` makes a request's body, null being plain. Returns a row for each
 * strength, with the words whose log-odds they have: `words`, or what plain answers begin with. */
export async function measure(body, [low, high], words, signal) {
  const strengths = Array.from({ length: STEPS + 1 }, (_, i) => Number((low + (i * (high - low)) / STEPS).toFixed(4)));
  const [plain, ...all] = await Promise.all([null, ...strengths].map((strength) => first(body(strength), signal)));
  const about = words.length ? words : [plain[0].token.trim()];
  return { words: about, plain: odds(plain, about), rows: strengths.map((strength, i) => ({ strength, ...odds(all[i], about), kl: divergence(plain, all[i]) })) };
}

/** The likeliest first tokens of an answer with their log-probabilities, the likeliest first. */
async function first(body, signal) {
  const request = { ...body, stream: undefined, stream_options: undefined, steer_readout: undefined, max_tokens: 1, ignore_eos: true, temperature: 0, logprobs: true, top_logprobs: LISTED };
  const answer = await json("/v1/chat/completions", { method: "POST", body: JSON.stringify(request), signal, headers: { "Content-Type": "application/json" } });
  return answer.choices[0].logprobs.content[0].top_logprobs;
}

const begins = (token, words) => token.trim() !== "" && words.some((word) => word.startsWith(token.trim()));
const sum = (tokens) => tokens.reduce((total, { logprob }) => total + Math.exp(logprob), 0);
const rest = (tokens) => Math.max(1e-9, 1 - sum(tokens)); // the mass of all that are not listed

/** ln p/(1−p) of an answer that begins with one of `words`, from what is listed. Where none of them is, the most that it
 * can be: all that is not listed (`least` is false then). */
function odds(listed, words) {
  const mine = listed.filter(({ token }) => begins(token, words)), known = mine.length > 0;
  const p = Math.min(1 - 1e-9, known ? sum(mine) : rest(listed));
  return { odds: Math.log(p / (1 - p)), known };
}

/** KL(plain ‖ steered) of the first token, with all that is not listed on both sides taken as one: never above the whole. */
export function divergence(plain, steered) {
  const other = new Map(steered.map(({ token, logprob }) => [token, logprob])), both = plain.filter(({ token }) => other.has(token));
  const p = rest(both), q = rest(both.map(({ token }) => ({ logprob: other.get(token) })));
  return Math.max(0, both.reduce((total, { token, logprob }) => total + Math.exp(logprob) * (logprob - other.get(token)), p * Math.log(p / q)));
}

/** Show what was measured; `pick` is called with the strength that the user points out. */
export function draw({ rows, words, plain }, now, pick) {
  const nearest = rows.reduce((best, row, i) => (Math.abs(row.strength - now) < Math.abs(rows[best].strength - now) ? i : best), 0);
  const points = rows.map((row, layer) => ({ ...row, layer, steered: row.known }));
  const at = ({ strength }) => `at ${shown(strength)}`;
  $("sweep-charts").replaceChildren(...PLOTS.map((plot) => chart({ ...plot, at }, points, nearest, (i) => pick(rows[i].strength))));
  $("sweep-text").textContent = `First words: ${words.join(", ")}. Plain: ${shown(plain.odds)}. From ${shown(rows[0].strength)} to ${shown(rows.at(-1).strength)}.${rows.some((row) => !row.known) ? " Hollow: none of the words is listed, so it is at most this." : ""}`;
}
