// Markdown as elements. Every piece of an answer becomes text of an element, so none of it can be markup; links are shown
// and lead nowhere.

import { el } from "./dom.js";

const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|\*([^\s*](?:.*?[^\s*])?)\*|\[([^\]]+)\]\(([^)\s]+)\)/s;
const BLOCKS = [
  [/^(#{1,6})\s+(.*)$/, (_, marks, text) => el("p", { className: "heading" }, ...inline(text))],
  [/^\s*([-*_])(?:\s*\1){2,}\s*$/, () => el("hr")],
];
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;

/** The nodes of `text`. */
export function rendered(text) {
  const lines = text.split("\n"), out = [];
  let paragraph = [], list = null;
  const close = () => {
    if (paragraph.length) out.push(el("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
    list = null;
  };
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i], fence = line.match(/^\s*(```+|~~~+)/), item = line.match(ITEM);
    const block = BLOCKS.find(([pattern]) => pattern.test(line));
    if (fence) {
      close();
      const end = lines.findIndex((other, j) => j > i && other.trim().startsWith(fence[1]));
      out.push(el("pre", { tabIndex: 0 }, el("code", { textContent: lines.slice(i + 1, end < 0 ? undefined : end).join("\n") })));
      i = end < 0 ? lines.length : end;
    } else if (block) {
      close();
      out.push(block[1](...line.match(block[0])));
    } else if (item) {
      const tag = item[2] ? "ol" : "ul";
      if (list?.localName !== tag) {
        close();
        out.push(list = el(tag, item[2] ? { start: Number(item[2]) } : {}));
      }
      const entry = el("li", {}, ...inline(item[3]));
      entry.style.setProperty("margin-left", `${Math.min(6, item[1].length / 2)}em`);
      list.append(entry);
    } else if (!line.trim()) {
      if (!ITEM.test(lines[i + 1] ?? "")) close(); // a list with gaps is one list
    } else if (list && /^\s/.test(line)) {
      list.lastChild.append("\n", ...inline(line.trim()));
    } else {
      if (list) close();
      paragraph.push(line);
    }
  }
  close();
  return out;
}

function inline(text) {
  const out = [];
  for (let found; (found = text.match(INLINE)); text = text.slice(found.index + found[0].length)) {
    const [, , code, strong, light, label, address] = found;
    out.push(text.slice(0, found.index), code !== undefined ? el("code", { textContent: code })
      : label !== undefined ? el("span", {}, ...inline(label), ` (${address})`)
      : el(light === undefined ? "strong" : "em", {}, ...inline(strong ?? light)));
  }
  return [...out, text];
}
