// The attribution of one target: masses, heat-map and strongest tokens of one view.
// Every number shown is the server's or a sum of the server's; a view is "all" (the whole
// attribution) or the number of one hop, whose scores are relative to that hop.

import { el } from "./dom.js";
import { LEVELS, heatLevel, heatScale, layOver, number, percent, thresholdScore, visible } from "./heat.js";

const ROWS = 10;
const MASSES = [
  ["input", "Prompt"],
  ["reasoning", "Left on reasoning"],
  ["target", "Target and answer"],
  ["skipped", "Skipped tokens"],
];

export class Report {
  /** `data` is a completed attribution with a score for each prompt token, `first` the one of the
   * same prompt that locates its tokens in `messages`. */
  constructor(data, first, messages) {
    this.messages = messages;
    this.located = new Map();
    for (const { index, message, start, end } of first.scores) {
      if (message !== undefined) this.located.set(index, { message, start, end });
    }
    this.data = {
      ...data,
      scores: data.scores.map((score) => ({ ...score, ...this.located.get(score.index) })),
      segments: this.#segments(data, first),
    };
    this.pieces = first.tokens;
  }

  /** Per prompt token. */
  scores(view) {
    if (view === "all") return this.data.scores.map((score) => score.score);
    return this.data.hops[view].scores;
  }

  masses(view) {
    const from = view === "all" ? this.data : this.data.hops[view];
    const reasoning = view === "all" ? from.remaining_mass : from.reasoning_mass;
    const named = { input: from.input_mass, reasoning, target: from.target_mass, skipped: from.skipped_mass };
    return MASSES.map(([kind, label]) => {
      const text = kind === "reasoning" && view !== "all" ? "On to the next hop" : label;
      return { kind, label: text, share: named[kind] ?? 0 };
    });
  }

  /** What the options keep: score floor, number of tokens and their share of the input's mass. */
  kept({ view, threshold }) {
    const scores = this.scores(view);
    const floor = thresholdScore(threshold, heatScale(scores, this.located));
    const shown = scores.filter((score) => score > 0 && score >= floor);
    const positive = scores.filter((score) => score > 0);
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    const share = positive.length ? sum(shown) / sum(positive) : 0;
    return { floor, tokens: shown.length, of: positive.length, share };
  }

  /** The elements of one view. */
  render(options) {
    const { view } = options;
    const context = { ...options, scores: this.scores(view), floor: this.kept(options).floor };
    context.scale = heatScale(context.scores, this.located);
    context.input = this.masses(view)[0].share;
    const what = view === "all" ? "Where " : `Hop ${this.data.hops[view].hop}: where `;
    return [
      el("h2", { class: "headline" }, what, el("q", {}, shortened(this.data.target.text)), " came from"),
      options.whole ? this.#wholeCard(context) : this.#messagesCard(context),
      this.#massCard(view),
      this.#topCard(context),
    ];
  }

  #segments(data, first) {
    const sums = new Map();
    let rest = 0;
    for (const { index, score } of data.scores) {
      const at = this.located.get(index)?.message;
      if (at === undefined) rest += score;
      else sums.set(at, (sums.get(at) ?? 0) + score);
    }
    return first.segments.map((segment) => ({
      ...segment,
      score: segment.message === undefined ? rest : (sums.get(segment.message) ?? 0),
    }));
  }

  #massCard(view) {
    const masses = this.masses(view);
    const label = masses.map((mass) => `${mass.label} ${percent(mass.share)}`).join(", ");
    const bar = el("div", { class: "bar", role: "img", "aria-label": label });
    for (const { kind, share } of masses) {
      if (share < 0.0005) continue;
      const part = el("span", { class: `m-${kind}` });
      part.style.flexGrow = share;
      bar.append(part);
    }
    const keys = masses.map(({ kind, label: text, share }) =>
      el("li", {}, el("span", { class: `swatch m-${kind}` }), `${text} `, el("b", {}, percent(share))),
    );
    return el("section", { class: "card" }, el("h2", {}, "Mass balance"), bar, el("ul", { class: "keys" }, ...keys));
  }

  #messagesCard(context) {
    const card = el("section", { class: "card map" }, this.#title("Prompt", context));
    let rest = context.scores.reduce((sum, score) => sum + score, 0);
    const lost = new Set(this.data.segments.flatMap((segment) => segment.unlocated_messages ?? []));
    this.messages.forEach((message, at) => {
      const own = [...this.located].filter(([, where]) => where.message === at);
      const tokens = own.map(([index, where]) => ({ index, ...where })).sort((a, b) => a.index - b.index);
      const share = tokens.reduce((sum, { index }) => sum + context.scores[index], 0);
      rest -= share;
      const text = el("div", { class: "text", dir: "auto" });
      for (const part of layOver(message.content, tokens)) text.append(mark(part, context, false));
      const of = context.input > 0 && !lost.has(at) ? ` · ${percent(share / context.input)} of input` : "";
      const note = lost.has(at) ? el("p", { class: "note" }, "Not located in the prompt: see the chat template too.") : null;
      card.append(el("h3", {}, el("b", {}, message.role), of), ...(note ? [note] : []), text);
    });
    const left = context.input > 0 ? percent(Math.max(0, rest) / context.input) : "0 %";
    const others = lost.size ? "Chat template and messages not located" : "Chat template";
    card.append(el("p", { class: "hint" }, `${others}: ${left} of input.`));
    return card;
  }

  #wholeCard(context) {
    const text = el("div", { class: "text", dir: "auto" });
    this.pieces.forEach((piece, index) => {
      if (piece) text.append(mark({ text: piece, indices: [index] }, context, !this.located.has(index)));
    });
    return el("section", { class: "card map" }, this.#title("Prompt with its chat template", context), text);
  }

  #title(name, context) {
    const steps = [];
    for (let level = 1; level <= LEVELS; level += 1) steps.push(el("span", { class: `step h${level}` }));
    const legend = el("p", { class: "legend", "aria-label": "Colour scale" }, el("span", {}, "low"), ...steps);
    legend.append(el("span", {}, `high (${number(context.scale)})`));
    return el("div", { class: "title" }, el("h2", {}, name), legend);
  }

  #topCard(context) {
    const kept = context.scores.map((score, index) => ({ score, index }));
    const listed = kept.filter(({ score, index }) => this.#listed(score, index, context));
    const best = listed.sort((a, b) => b.score - a.score || a.index - b.index).slice(0, ROWS);
    const rows = best.map(({ score, index }, rank) => {
      const where = this.located.get(index);
      const cells = [
        el("td", { class: "n" }, String(rank + 1)),
        el("td", {}, el("code", {}, visible(this.data.scores[index].token))),
        el("td", { class: "role" }, where ? this.messages[where.message].role : "template"),
        el("td", { class: "n" }, number(score)),
        el("td", { class: "n" }, context.input > 0 ? percent(score / context.input) : "–"),
      ];
      return el("tr", {}, ...cells);
    });
    const heads = ["#", "Token", "Message", "Score", "Of input"];
    const classes = ["n", null, "role", "n", "n"];
    const head = heads.map((name, i) => el("th", { class: classes[i], scope: "col" }, name));
    const table = el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
    return el("section", { class: "card" }, el("h2", {}, "Strongest tokens"), el("div", { class: "scroll" }, table));
  }

  #listed(score, index, { floor, whole }) {
    return score > 0 && score >= floor && (whole || this.located.has(index));
  }
}

function mark(part, context, template) {
  const { indices, text } = part;
  if (!indices.length) return el("span", { class: "tpl" }, text);
  const score = indices.reduce((sum, index) => sum + context.scores[index], 0);
  const level = score < context.floor ? 0 : heatLevel(score, context.scale, context.mode);
  if (level === 0) return el("span", { class: template ? "tpl" : null }, text);
  const of = context.input > 0 && !template ? ` · ${percent(score / context.input)} of input` : "";
  const note = `score ${number(score)}${of}${template ? " · template" : ""}`;
  // The map is one stop of the Tab key; arrow keys move within it.
  const shown = !text.trim() && text.includes("\n") ? [el("i", { class: "nl", "aria-hidden": "true" }, "↵"), text] : [text];
  return el("mark", { class: `h${level}${template ? " tpl" : ""}`, tabindex: "-1", "aria-description": note }, ...shown);
}

function shortened(text) {
  const points = Array.from(text.trim());
  return points.length > 120 ? `${points.slice(0, 119).join("")}…` : points.join("");
}
