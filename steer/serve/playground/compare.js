// Which words of two answers differ: marks over the text that leave the elements as they are.

const MOST = 4e6; // cells of the table; longer answers are compared without it

/** Ranges of the words of two elements that are not in their longest common subsequence. */
export function differing(left, right) {
  const texts = [left, right].map((box) => words(box.textContent)), [a, b] = texts;
  const same = [new Set(), new Set()];
  let start = 0, end = 0;
  while (start < Math.min(a.length, b.length) && a[start].word === b[start].word) start += 1;
  while (end < Math.min(a.length, b.length) - start && a.at(-1 - end).word === b.at(-1 - end).word) end += 1;
  for (const [side, all] of texts.entries()) all.forEach((_, i) => { if (i < start || i >= all.length - end) same[side].add(i); });
  for (const [i, j] of common(a.slice(start, a.length - end), b.slice(start, b.length - end))) { same[0].add(start + i); same[1].add(start + j); }
  return [left, right].flatMap((box, side) => ranges(box, texts[side].filter((_, i) => !same[side].has(i))));
}

const words = (text) => [...text.matchAll(/\S+/g)].map((found) => ({ word: found[0], from: found.index, to: found.index + found[0].length }));

/** Pairs of places of a longest common subsequence. */
function common(a, b) {
  if (a.length * b.length > MOST) return [];
  const width = b.length + 1, best = new Uint16Array((a.length + 1) * width), pairs = [];
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      best[i * width + j] = a[i].word === b[j].word ? best[(i + 1) * width + j + 1] + 1 : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i].word === b[j].word) pairs.push([i++, j++]);
    else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return pairs;
}

function ranges(box, marked) {
  const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT), out = [];
  let node = walker.nextNode(), before = 0;
  const place = (at) => {
    while (node && before + node.length < at) { before += node.length; node = walker.nextNode(); }
    return [node, at - before];
  };
  for (const { from, to } of marked) {
    const range = new Range();
    range.setStart(...place(from));
    range.setEnd(...place(to));
    out.push(range);
  }
  return out;
}
