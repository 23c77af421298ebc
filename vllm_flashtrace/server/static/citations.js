// The parts of an answer and the sources that they came from.
// Pointing at a part, or moving to it with the keyboard, lights its sources up and fades the
// others; a click or Enter keeps it so. What is added to the answer's text is drawn by the style
// sheet, so that the text stays that of its tokens.

import { el, units } from "./dom.js";
import { percent } from "./heat.js";

const VERDICTS = { supported: "✓ supported", weak: "≈ weak", unsupported: "✗ unsupported" };

/** What an attribution says of each of its targets, as attributions of one target. */
export function partsOf(data) {
  const { targets, citations, ...common } = data;
  return targets ? targets.map((target) => ({ ...common, ...target })) : [data];
}

export class Citations {
  /** `data` is a completed attribution with citations of `answer`, `documents` are its sources in
   * their order; `onPin(index)` is told which part the user chose. */
  constructor(data, answer, documents, name, onPin) {
    this.documents = documents;
    this.onPin = onPin;
    this.pinned = null;
    const cited = new Map(data.citations.map((citation) => [citation.start, citation.sources]));
    const placed = partsOf(data)
      .map((part, index) => ({ part, index }))
      .filter(({ part }) => part.target.start !== undefined)
      .sort((a, b) => a.part.target.start - b.part.target.start);
    this.claims = placed.map(({ part, index }, at) => {
      const { start, end } = part.target;
      const sources = cited.get(start) ?? [];
      const verdict = VERDICTS[part.verification?.verdict] ? part.verification.verdict : null;
      const claim = { part, index, sources, verdict, range: [units(answer, start), units(answer, end)] };
      return { ...claim, ...this.#elements(claim, at, `${name}-${at}`) };
    });
    this.items = documents.map((document) => this.#source(document));
    this.list = el("ol", { class: "sources", "aria-label": "Sources" }, ...this.items.map(({ item }) => item));
    this.descriptions = el("div", { hidden: true }, ...this.claims.map(({ description }) => description));
    this.light(null);
  }

  /** Chooses the part with this index among the targets, or none. */
  pin(index) {
    this.pinned = index;
    for (const claim of this.claims) claim.element.setAttribute("aria-pressed", String(claim.index === index));
    this.#rest();
  }

  /** Shows the sources of a part; of none, all are alike. */
  light(claim) {
    for (const other of this.claims) other.element.classList.toggle("lit", other === claim);
    this.items.forEach(({ item, share, text }, index) => {
      const source = claim?.sources.find((each) => each.index === index);
      const score = claim?.part.sources?.[index]?.score;
      item.classList.toggle("lit", Boolean(source));
      item.classList.toggle("faded", Boolean(claim) && !source);
      const input = claim?.part.input_mass;
      const of = input > 0 && typeof score === "number" ? `${percent(score / input)} of input` : "";
      share.textContent = claim ? [source ? "cited" : "not cited", VERDICTS[source?.verdict], of].filter(Boolean).join(" · ") : "";
      text.replaceChildren(...quoted(this.documents[index].text, source));
      const quote = text.querySelector("mark");
      // Moves the source's own scroll bar alone: the page stays where it is.
      text.scrollTop = quote ? quote.offsetTop - text.clientHeight / 3 : 0;
    });
  }

  #elements({ sources, verdict, index }, at, id) {
    const named = sources.map((source) => `[${source.index + 1}] ${this.documents[source.index].title}: “${source.text}”`);
    const text = [named.length ? `Sources: ${named.join("; ")}` : "No source", verdict].filter(Boolean).join(". ");
    const description = el("p", { id: `cited-${id}` }, text);
    const attributes = { class: "claim", role: "button", tabindex: at ? "-1" : "0", "aria-pressed": "false" };
    attributes["aria-describedby"] = description.id;
    if (sources.length) attributes["data-numbers"] = sources.map((source) => `[${source.index + 1}]`).join("");
    const element = el("span", attributes);
    const chip = verdict ? el("span", { class: `chip ${verdict}`, "data-label": VERDICTS[verdict] }) : null;
    const choose = () => (this.pinned === index ? this.pin(null) : this.onPin(index));
    element.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && this.light(this.claims[at]));
    element.addEventListener("pointerleave", () => this.#rest());
    element.addEventListener("blur", () => this.#rest());
    element.addEventListener("focus", () => {
      // The parts are one stop of the Tab key; arrow keys move among them.
      for (const other of this.claims) other.element.setAttribute("tabindex", other.element === element ? "0" : "-1");
      this.light(this.claims[at]);
    });
    // The end of a selection with the mouse is no click on the part.
    element.addEventListener("click", () => document.getSelection().isCollapsed && choose());
    element.addEventListener("keydown", (event) => this.#key(event, at, choose));
    return { element, chip, description };
  }

  #key(event, at, choose) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = this.claims.length - 1;
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
    if (to === undefined && event.key !== "Enter" && event.key !== " ") return;
    // The answer around the parts has keys of its own, for tokens.
    event.stopPropagation();
    event.preventDefault();
    if (to === undefined) return choose();
    this.claims[Math.max(0, Math.min(last, to))].element.focus();
  }

  /** Back to the part that has the focus, or was chosen. */
  #rest() {
    const focused = this.claims.find(({ element }) => element === document.activeElement);
    this.light(focused ?? this.claims.find(({ index }) => index === this.pinned) ?? null);
  }

  #source({ number, title }) {
    const share = el("span", { class: "share" });
    const text = el("div", { class: "text", dir: "auto" });
    const item = el("li", { class: "source" }, el("h3", {}, el("b", {}, `[${number}] ${title}`), " ", share), text);
    return { item, share, text };
  }
}

/** A document's text with the sentence that is cited. */
function quoted(text, source) {
  if (!source) return [text];
  const [start, end] = [units(text, source.start), units(text, source.end)];
  return [text.slice(0, start), el("mark", { class: "quote" }, text.slice(start, end)), text.slice(end)];
}
