// Documents that go with the next message: pasted, dropped, chosen as files or typed.
// In the message each is a title and a text; the text is a source, by its place there.

import { $, el, points } from "./dom.js";

const LONGEST_FILE = 1 << 20; // Bytes.
const LONGEST_TITLE = 120;

/** The message with its documents in front of the question, and each document's `span`
 * [start, end) in it, in code points. */
export function withDocuments(question, documents) {
  let content = "";
  const placed = documents.map(({ title, text }) => {
    content += `[${title}]\n`;
    const start = points(content);
    content += text;
    const span = [start, points(content)];
    content += "\n\n";
    return { title, text, span };
  });
  return { content: content + question, documents: placed };
}

export class Documents {
  /** `earlier()` is the number of documents that were sent before, `say` and `problem` tell the
   * user what happened. */
  constructor(earlier, say, problem) {
    this.list = [];
    this.earlier = earlier;
    this.say = say;
    this.problem = problem;
    $("add").addEventListener("click", () => this.#addTyped());
    $("choose").addEventListener("click", () => $("files").click());
    $("files").addEventListener("change", () => {
      this.#addFiles([...$("files").files]);
      $("files").value = "";
    });
    $("paste").addEventListener("paste", (event) => this.#take(event, event.clipboardData));
    $("paste").addEventListener("drop", (event) => this.#take(event, event.dataTransfer));
    // A file that is dropped beside a drop zone would replace the page.
    document.addEventListener("dragover", (event) => {
      if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
    });
    document.addEventListener("drop", (event) => {
      if (event.dataTransfer?.files.length) this.#take(event, event.dataTransfer);
    });
  }

  /** All documents, the text that still stands in the field included. */
  all() {
    this.#addTyped();
    return [...this.list];
  }

  /** Replaces all documents. */
  set(list) {
    this.list = [];
    for (const { title, text } of list) this.#add(title, text);
    this.draw();
  }

  draw() {
    const items = this.list.map(({ title, text }, at) => {
      const remove = el("button", { type: "button", "aria-label": `Remove ${title}` }, "✕");
      remove.addEventListener("click", () => this.#remove(at));
      const number = el("b", {}, `[${this.#number(at)}] `);
      const length = el("span", { class: "soft" }, ` ${points(text)} characters`);
      return el("li", {}, el("span", { dir: "auto" }, number, title, length), remove);
    });
    $("documents").replaceChildren(...items);
    $("documents").hidden = !items.length;
  }

  #number(at) {
    return this.earlier() + at + 1;
  }

  #add(title, text) {
    const clean = text.replace(/\r\n?/g, "\n").trim();
    if (!clean) return false;
    const named = title.replace(/\s+/g, " ").trim().slice(0, LONGEST_TITLE);
    this.list.push({ title: named || `Document ${this.#number(this.list.length)}`, text: clean });
    this.draw();
    this.say(`Added ${this.list.at(-1).title}.`);
    return true;
  }

  #addTyped() {
    if (this.#add("", $("paste").value)) $("paste").value = "";
  }

  #take(event, data) {
    const files = [...data.files];
    const text = data.getData("text/plain");
    if (!files.length && !text.trim()) return;
    event.preventDefault();
    event.stopPropagation();
    if (files.length) this.#addFiles(files);
    else this.#add("", text);
  }

  async #addFiles(files) {
    for (const file of files) {
      try {
        this.#add(file.name, await textOf(file));
      } catch (error) {
        this.problem(`${file.name} was not added: ${error.message}.`);
      }
    }
  }

  #remove(at) {
    const [removed] = this.list.splice(at, 1);
    this.draw();
    this.say(`Removed ${removed.title}.`);
    const buttons = $("documents").querySelectorAll("button");
    (buttons[Math.min(at, buttons.length - 1)] ?? $("paste")).focus();
  }
}

async function textOf(file) {
  if (file.size > LONGEST_FILE) throw new Error("it is larger than 1 MiB");
  const bytes = await file.arrayBuffer();
  let text = null;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    // Not UTF-8: said below.
  }
  if (text === null || text.includes("\0")) throw new Error("it is no text in UTF-8");
  if (!text.trim()) throw new Error("it is empty");
  return text;
}
