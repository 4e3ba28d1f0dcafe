// The current request as code: what this page sends for the steered side, without what only the page needs.

/** `body` as a curl command. A key stays out of it: the shell has it. */
export function curl(url, body, withKey) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $STEER_API_KEY"` : "";
  return `curl -sN -i ${url}/v1/chat/completions \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${quoted}'`;
}

/** `body` as Python with the package `openai`. */
export function python(url, body, withKey) {
  const { steer, steer_readout, stream, ...known } = body;
  const extra = Object.fromEntries(Object.entries({ steer, steer_readout }).filter(([, value]) => value !== undefined));
  const lines = Object.entries(known).map(([name, value]) => `    ${name}=${literal(value, 1)},`);
  return `${withKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${url}/v1", api_key=${withKey ? 'os.environ["STEER_API_KEY"]' : '"none"'})
raw = client.chat.completions.with_raw_response.create(
${lines.join("\n")}
    extra_body=${literal(extra, 1)},
)
print(raw.headers["x-steer-applied"])
print(raw.parse().choices[0].message.content)`;
}

/** A JSON value as Python writes it. */
function literal(value, depth) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const pad = "    ".repeat(depth), list = Array.isArray(value);
  const parts = list ? value.map((item) => literal(item, depth + 1)) : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, depth + 1)}`);
  const [open, close] = list ? "[]" : "{}";
  const short = open + parts.join(", ") + close;
  return short.length < 80 && !short.includes("\n") ? short : `${open}\n${parts.map((part) => `${pad}    ${part},\n`).join("")}${pad}${close}`;
}
