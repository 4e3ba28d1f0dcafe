// The list of directions, and putting and deleting their files. What was refused stays in the list with its reasons.

import { call, json, Problem } from "./api.js";
import { $, el } from "./dom.js";

const SUFFIX = ".safetensors";

export class Directions {
  /** `changed` is called whenever the list may have changed. */
  constructor(changed) {
    this.items = [];
    this.changed = changed;
    this.managed = true; // may files be put and deleted here
    this.file = null;
    $("choose").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => this.take($("file").files[0]));
    $("cancel").addEventListener("click", () => this.take(null));
    $("name").addEventListener("input", () => this.warn());
    $("naming").addEventListener("submit", (event) => { event.preventDefault(); this.put(); });
    for (const kind of ["dragenter", "dragover"]) addEventListener(kind, (event) => this.hover(event, true));
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) this.hover(event, false); });
    addEventListener("drop", (event) => {
      this.hover(event, false);
      if (this.managed) this.take(event.dataTransfer.files[0]);
    });
  }

  get served() {
    return this.items.filter((item) => item.status !== "failed");
  }

  async refresh() {
    this.items = (await json("/v1/directions")).data;
    this.render();
    this.changed();
  }

  render() {
    $("list").replaceChildren(...this.items.map((item) => {
      const remove = this.managed && el("button", { type: "button", className: "quiet", textContent: "Delete", ariaLabel: `Delete ${item.id}` });
      if (remove) remove.addEventListener("click", () => this.remove(item.id, remove));
      const kind = { failed: "failed-file", stale: "stale" }[item.status] ?? "";
      const problems = item.errors.length ? el("details", {}, el("summary", { textContent: counted(item.errors.length) }), listOf(item.id, item.errors)) : null;
      const digest = el("code", { textContent: item.digest?.slice(0, 8) ?? "refused", title: item.digest ?? "" });
      return el("li", { className: kind }, el("i"), el("span", { textContent: item.id, title: item.id }), digest, remove || null, problems);
    }));
  }

  hover(event, over) {
    if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
    event.preventDefault(); // or the browser would show the file in the page's place
    document.body.classList.toggle("dropping", over && this.managed);
  }

  /** A file was chosen: it is named before it is sent. */
  take(file) {
    this.file = file ?? null;
    $("file").value = "";
    $("naming").hidden = !file;
    $("choose").parentElement.hidden = Boolean(file);
    if (!file) return;
    document.body.classList.add("controls-open");
    $("name").value = file.name.replace(SUFFIX, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "");
    this.warn();
    $("name").focus();
    $("name").select();
  }

  warn() {
    const known = this.served.some((item) => item.id === $("name").value);
    $("replaces").textContent = known ? "This name is served: the file takes its place for requests from then on." : "";
  }

  async put() {
    const name = $("name").value.trim(), file = this.file;
    $("put").disabled = true;
    try {
      const made = await json(`/v1/directions/${encodeURIComponent(name)}`, { method: "PUT", body: file, headers: { "Content-Type": "application/octet-stream" } });
      const source = made.source_layer == null ? "a direction for each layer" : `source layer ${made.source_layer}`;
      this.report(name, "good", `${name} is served: ${made.method}, ${source}, ${made.mode} at ${made.strength}, digest ${made.digest.slice(0, 8)}. Every check passed.`);
      this.take(null);
      await this.refresh();
      this.changed(name);
    } catch (error) {
      await this.refused(name, error);
    } finally {
      $("put").disabled = false;
    }
  }

  /** The report of a refused file, its problems one by one. */
  async refused(name, error) {
    await this.refresh().catch(() => {});
    this.report(name, "bad", `${name} was not accepted${this.served.some((item) => item.id === name) ? "; the old version serves on" : ""}.`, error.problems?.length ? error.problems : [error.message]);
  }

  async remove(name, button) {
    if (!button.classList.contains("sure")) {
      button.classList.add("sure");
      button.textContent = "Really?";
      button.addEventListener("blur", () => { button.classList.remove("sure"); button.textContent = "Delete"; }, { once: true });
      return;
    }
    try {
      await call(`/v1/directions/${encodeURIComponent(name)}`, { method: "DELETE" });
      this.report(name, "good", `${name} is no longer served.`);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      this.report(name, "bad", `${name} was not deleted.`, [error.message]);
    }
    await this.refresh();
  }

  report(name, kind, text, problems = []) {
    $("report").className = kind;
    $("report").replaceChildren(el("p", { textContent: text }), ...(problems.length ? [listOf(name, problems)] : []));
    $("report").scrollIntoView({ block: "nearest" });
  }
}

const counted = (count) => (count === 1 ? "1 problem" : `${count} problems`);

/** Problems as a list; the name that the server puts before each is known here. */
function listOf(name, problems) {
  return el("ul", {}, ...problems.map((text) => el("li", { textContent: text.startsWith(`${name}: `) ? text.slice(name.length + 2) : text })));
}
