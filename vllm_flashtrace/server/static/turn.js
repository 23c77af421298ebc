// One answer: its text while it streams, then its tokens, and which of them are selected.
// Once the tokens are known, the shown text is theirs, so a selection is a span of tokens
// [first, last) counted as the server counts generated tokens.

import { el, selectedRange } from "./dom.js";

const PATH_LEVELS = 4;

export class Turn {
  /** `request` is what was sent: `model` and `messages`; `documents` are all that stand in these.
   * `onSelect(turn, selection)` is told what the user chose with the keyboard. */
  constructor(number, request, documents, onSelect) {
    this.number = number;
    this.request = request;
    this.documents = documents;
    this.citations = null;
    this.content = "";
    this.reasoning = "";
    this.finished = false;
    this.first = null; // The attribution that came with the tokens.
    this.pieces = null;
    this.tokenIds = [];
    this.spans = new Map(); // Generated token index to its element.
    this.cursor = null;
    this.onSelect = onSelect;
    const label = "Answer: select a part to attribute it; arrow keys and Enter work too";
    this.answer = el("div", { class: "text answer", dir: "auto", tabindex: "0", role: "group", "aria-label": label });
    this.thought = el("div", { class: "text thought", dir: "auto" });
    this.thinking = el("details", { class: "thinking", hidden: true }, el("summary", {}, "Reasoning"), this.thought);
    this.note = el("p", { class: "soft" });
    this.legend = el("p", { class: "soft" }, "Blue: what the attribution passed through on its way to the prompt.");
    this.parts = [this.answer, this.thought];
    this.element = el("li", { class: "card turn" }, el("h2", {}, "Answer"), this.thinking, this.answer, this.legend, this.note);
    this.legend.hidden = true;
    this.answer.addEventListener("keydown", (event) => this.#key(event));
  }

  append(content, reasoning) {
    this.content += content;
    this.reasoning += reasoning;
    if (content) this.answer.append(content);
    if (reasoning) {
      this.thought.append(reasoning);
      this.thinking.hidden = false;
    }
  }

  /** Takes over the tokens of an attribution that includes the generated ones, and draws the
   * citations, if any, into the answer. */
  setTokens(data, citations = null) {
    this.first = data;
    this.pieces = data.generated.map((row) => row.token ?? "");
    this.tokenIds = data.generated.map((row) => row.token_id);
    const joined = this.pieces.join("");
    const answerAt = joined.lastIndexOf(this.content);
    const thoughtAt = this.reasoning ? joined.indexOf(this.reasoning) : -1;
    if (answerAt < 0 || !this.content) {
      // The server rewrote the text: the raw tokens are what can be selected exactly.
      this.#fill(this.answer, [0, joined.length]);
      this.note.textContent = "Shown as generated: the answer's text does not occur in its tokens.";
    } else {
      this.#fill(this.answer, [answerAt, answerAt + this.content.length], citations?.claims);
      if (citations) {
        this.citations = citations;
        this.answer.after(citations.descriptions, el("h2", { class: "above" }, "Sources"), citations.list);
      }
    }
    if (thoughtAt >= 0) this.#fill(this.thought, [thoughtAt, thoughtAt + this.reasoning.length]);
  }

  /** The documents that the question came with. */
  get sent() {
    return this.documents.filter(({ message }) => message === this.request.messages.length - 1);
  }

  /** Token spans of the reasoning, [] if none is known. */
  get reasoningSpan() {
    const at = this.reasoning && this.pieces ? this.pieces.join("").indexOf(this.reasoning) : -1;
    return at < 0 ? null : this.#tokensOf([at, at + this.reasoning.length]);
  }

  /** The selected part, as text range of one of the parts, or null. */
  selection() {
    for (const part of this.parts) {
      const range = selectedRange(part);
      if (range) return { part, range, text: part.textContent };
    }
    return null;
  }

  /** Token span of a selection, null where the part's text is not (or no longer) its tokens'. */
  spanOf({ part, range, text }) {
    const offset = Number(part.dataset.offset ?? -1);
    return offset < 0 || part.textContent !== text ? null : this.#tokensOf([offset + range[0], offset + range[1]]);
  }

  /** Draws the target and how much mass passed through each generated token. */
  mark(target, generated) {
    const most = generated.reduce((top, row) => Math.max(top, row.score), 0);
    this.legend.hidden = true;
    for (const [index, span] of this.spans) {
      const score = generated[index]?.score ?? 0;
      const level = most > 0 ? Math.floor(PATH_LEVELS * Math.sqrt(score / most)) : 0;
      const inTarget = target.some(([start, end]) => start <= index && index < end);
      if (level > 0 && !inTarget) this.legend.hidden = false;
      span.className = inTarget ? "t target" : level > 0 ? `t g${level}` : "t";
      span.title = score > 0 && !inTarget ? `${(100 * score).toFixed(2)} % of the mass passed here` : "";
    }
  }

  unmark() {
    this.citations?.pin(null);
    this.legend.hidden = true;
    for (const span of this.spans.values()) {
      span.className = "t";
      span.title = "";
    }
  }

  #tokensOf([start, end]) {
    let at = 0;
    let first = null;
    let last = null;
    this.pieces.forEach((piece, index) => {
      const next = at + piece.length;
      // A token without text of its own belongs to the character before it.
      const touched = piece ? at < end && next > start : last === index;
      if (touched) {
        first ??= index;
        last = index + 1;
      }
      at = next;
    });
    return first === null ? null : [first, last];
  }

  /** `claims` are the parts of the text that have elements of their own, in order. */
  #fill(part, [start, end], claims = []) {
    part.dataset.offset = start;
    part.replaceChildren();
    let at = 0;
    this.pieces.forEach((piece, index) => {
      const text = piece.slice(Math.max(0, start - at), Math.max(0, end - at));
      const from = Math.max(0, at - start);
      at += piece.length;
      if (!text) return;
      const claim = claims.find(({ range }) => from < range[1] && from + text.length > range[0]);
      const [first, last] = claim ? claim.range.map((edge) => Math.max(0, edge - from)) : [0, text.length];
      const span = el("span", { class: "t" }, text.slice(first, last));
      this.spans.set(index, span);
      // What a token has outside its claim, such as a line break, stands outside.
      if (first) part.append(text.slice(0, first));
      if (claim && !part.contains(claim.element)) part.append(...[claim.element, claim.chip].filter(Boolean));
      (claim?.element ?? part).append(span);
      if (last < text.length) part.append(text.slice(last));
    });
  }

  #key(event) {
    const indices = [...this.spans.keys()].filter((i) => this.answer.contains(this.spans.get(i)));
    if (!indices.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.cursor ? indices.indexOf(this.cursor.focus) : -1;
    const to = {
      ArrowRight: Math.min(indices.length - 1, at + 1),
      ArrowLeft: Math.max(0, at - 1),
      Home: 0,
      End: indices.length - 1,
    }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      const focus = indices[to];
      this.cursor = { anchor: event.shiftKey && this.cursor ? this.cursor.anchor : focus, focus };
      this.#select();
    } else if ((event.key === "Enter" || event.key === " ") && this.cursor) {
      event.preventDefault();
      const chosen = this.selection();
      if (chosen) this.onSelect(this, chosen);
    }
  }

  #select() {
    const { anchor, focus } = this.cursor;
    const [first, last] = [this.spans.get(Math.min(anchor, focus)), this.spans.get(Math.max(anchor, focus))];
    const range = document.createRange();
    range.setStartBefore(first);
    range.setEndAfter(last);
    document.getSelection().removeAllRanges();
    document.getSelection().addRange(range);
    this.element.dispatchEvent(new CustomEvent("spoken", { bubbles: true, detail: `Selected: ${range}` }));
  }
}
