// A sweep: what the first token of the answer would be at many strengths, in one batch of the server's.

import { inTurns, json, Problem } from "./api.js";
import { $, shown } from "./dom.js";
import { chart } from "./profile.js";

const STEPS = 12;
const LISTED = 20; // likeliest tokens: the most that servers list
const PLOTS = [
  { title: "Log-odds of these first words", lines: [["odds", ""]], zero: true },
  { title: "KL from the plain answer, nats", lines: [["kl", ""]], from: 0 },
];

/** Measure plain and the strengths of a range, but for what is in `known` (first tokens by strength) already; null is
 * plain. `body(strength)` makes a request's body. Where one is refused the others are kept: the result is `{ strengths,
 * known, refused }`, the last a Problem or nothing, and another call measures what is missing. */
export async function measure(body, [low, high], known) {
  const strengths = [...new Set(Array.from({ length: STEPS + 1 }, (_, i) => Number((low + (i * (high - low)) / STEPS).toFixed(4))))];
  const rest = [null, ...strengths].filter((strength) => !known.has(strength));
  let refused = null;
  await inTurns(rest, async (strength) => {
    try {
      known.set(strength, await first(body(strength)));
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      refused ??= error;
      if (![400, 403].includes(error.status)) rest.length = 0; // at other strengths it would be no other
    }
  });
  return { strengths, known, refused };
}

/** The likeliest first tokens of an answer with their log-probabilities, the likeliest first. */
async function first(body) {
  const request = { ...body, stream: undefined, stream_options: undefined, steer_readout: undefined, max_tokens: 1, ignore_eos: true, temperature: 0, logprobs: true, top_logprobs: LISTED };
  const answer = await json("/v1/chat/completions", { method: "POST", body: JSON.stringify(request), headers: { "Content-Type": "application/json" } });
  return answer.choices[0].logprobs.content[0].top_logprobs;
}

const begins = (token, words) => token.trim() !== "" && words.some((word) => word.startsWith(token.trim()));
const sum = (tokens) => tokens.reduce((total, { logprob }) => total + Math.exp(logprob), 0);
const rest = (tokens) => Math.max(1e-9, 1 - sum(tokens)); // the mass of all that are not listed

/** ln p/(1−p) of an answer that begins with one of `words`, from what is listed. Where none of them is, the most that it
 * can be: all that is not listed (`steered` is false then, which the chart draws hollow). */
function odds(listed, words) {
  const mine = listed.filter(({ token }) => begins(token, words)), steered = mine.length > 0;
  const p = Math.min(1 - 1e-9, steered ? sum(mine) : rest(listed));
  return { odds: Math.log(p / (1 - p)), steered };
}

/** KL(plain ‖ steered) of the first token, with all that is not listed on both sides taken as one: never above the whole. */
export function divergence(plain, steered) {
  const other = new Map(steered.map(({ token, logprob }) => [token, logprob])), both = plain.filter(({ token }) => other.has(token));
  const p = rest(both), q = rest(both.map(({ token }) => ({ logprob: other.get(token) })));
  return Math.max(0, both.reduce((total, { token, logprob }) => total + Math.exp(logprob) * (logprob - other.get(token)), p * Math.log(p / q)));
}

/** Show what was measured, for the log-odds of `words` or of what the plain answer begins with; `pick` is called with the
 * strength that the user points out. */
export function draw({ strengths, known, refused }, words, now, pick) {
  const plain = known.get(null), about = words.length ? words : [plain?.[0].token.trim()], missing = strengths.filter((strength) => !known.has(strength)).length;
  const lacking = refused && `${plain ? "" : "Not plain, and "}${strengths.length - missing} of ${strengths.length} strengths measured: ${refused.message.replace(/\.?$/, ".")} Measure again asks for the rest.`;
  if (!plain) { $("sweep-charts").replaceChildren(); $("sweep-text").textContent = lacking; return; }
  const points = strengths.map((strength, layer) => {
    const found = known.get(strength);
    return found ? { strength, layer, ...odds(found, about), kl: divergence(plain, found) } : { strength, layer, odds: null, kl: null, steered: true };
  });
  const nearest = points.reduce((best, point, i) => (Math.abs(point.strength - now) < Math.abs(points[best].strength - now) ? i : best), 0);
  const at = ({ strength }) => `at ${shown(strength)}`;
  $("sweep-charts").replaceChildren(...PLOTS.map((plot) => chart({ ...plot, at }, points, nearest, (i) => pick(strengths[i]))));
  const said = [`First words: ${about.join(", ")}.`, `Plain: ${shown(odds(plain, about).odds)}.`, `From ${shown(strengths[0])} to ${shown(strengths.at(-1))}.`,
    points.some((point) => !point.steered) && "Hollow: none of the words is listed, so it is at most this.", lacking];
  $("sweep-text").textContent = said.filter(Boolean).join(" ");
}
