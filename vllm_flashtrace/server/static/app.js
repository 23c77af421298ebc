// The page: what the user does, and what is shown for it.
// At most one answer is generated and one attribution fetched at a time; a newer one
// cancels the older, whose outcome is then never shown.

import { ApiError, attribute, models, setApiKey, streamChat } from "./api.js";
import { Citations, partsOf } from "./citations.js";
import { Documents, withDocuments } from "./documents.js";
import { $, el } from "./dom.js";
import { saveHtml, saveJson } from "./download.js";
import { number, percent } from "./heat.js";
import { moveMark, moveTab } from "./keys.js";
import { Report } from "./report.js";
import { chatBody, selectionBody, textBody } from "./requests.js";
import { watchSelections } from "./selecting.js";
import { Turn } from "./turn.js";

const EXAMPLE = {
  documents: [
    { title: "harbour.txt", text: "Ferries to Texel leave Den Helder every hour. Bicycles travel free of charge." },
    { title: "lighthouse.txt", text: "The Eierland lighthouse was built in 1864. It has 153 steps to the top." },
    { title: "bakery.txt", text: "The bakery in De Koog sells almond rolls. It is closed on Tuesdays." },
  ],
  question: "Summarize the documents in three sentences.",
};
const turns = [];
let shown = null; // { turn, report, whole }: with citations, the attribution that the report is a part of.
let view = "all";
let generating = null;
let tracing = null;

function say(text) {
  $("live").textContent = text;
}

function problem(text) {
  $("problem-text").textContent = text;
  $("problem").hidden = !text;
}

function failed(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof ApiError)) console.error(error);
  problem(error.message);
  if (error.status === 401) {
    $("settings").open = true;
    $("key").focus();
  }
}

async function loadModels() {
  try {
    const names = await models();
    $("model").replaceChildren(...names.map((name) => el("option", {}, name)));
    problem("");
  } catch (error) {
    failed(error);
  }
}

const documents = new Documents(() => turns.at(-1)?.documents.length ?? 0, say, problem);

/** The messages with a new one of the user, and all documents in them, numbered. */
function conversation(question, added) {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  const placed = [];
  const send = (content, sent) => {
    for (const document of sent) placed.push({ ...document, number: placed.length + 1, message: messages.length });
    messages.push({ role: "user", content });
  };
  for (const turn of turns) {
    send(turn.request.messages.at(-1).content, turn.sent);
    messages.push({ role: "assistant", content: turn.content });
  }
  const last = withDocuments(question, added);
  send(last.content, last.documents);
  return { messages, placed };
}

async function ask(question) {
  if (generating) return;
  if (!$("model").value) await loadModels();
  if (!$("model").value) return;
  problem("");
  const { messages, placed } = conversation(question, documents.all());
  const turn = new Turn(turns.length + 1, { model: $("model").value, messages }, placed, explain);
  const label = el("li", { class: "turn question" }, el("h2", {}, "You"), el("div", { class: "text", dir: "auto" }, question));
  const names = turn.sent.map(({ number, title }) => el("li", { dir: "auto" }, el("b", {}, `[${number}] `), title));
  if (names.length) label.append(el("ul", { class: "picked", "aria-label": "Documents" }, ...names));
  $("turns").append(label, turn.element);
  generating = new AbortController();
  tracing?.abort();
  busy(true, "Answering …");
  try {
    await generate(turn, generating.signal);
    $("question").value = "";
    documents.set([]);
  } catch (error) {
    failed(error);
    if (error.name === "AbortError") turn.note.textContent = "Stopped.";
    if (!turn.content && !turn.reasoning) for (const element of [label, turn.element]) element.remove();
    say("");
  } finally {
    if (turn.content) turns.push(turn);
    generating = null;
    busy(false);
  }
}

async function generate(turn, signal) {
  let data = null;
  for await (const event of streamChat(chatBody(turn), signal)) {
    for (const { delta, finish_reason: reason } of event.choices) {
      turn.append(delta.content ?? "", delta.reasoning ?? delta.reasoning_content ?? "");
      if (reason) say("Attributing the answer …");
      data = delta.flashtrace ?? data;
    }
  }
  if (data?.status !== "completed") {
    const error = data?.error;
    throw new ApiError(`No attribution of the whole answer: ${error ? `${error.code}: ${error.message}` : "none came"}.`);
  }
  const parts = partsOf(data);
  if (!data.citations) {
    turn.setTokens(data);
    return show(turn, data);
  }
  const pin = (index) => show(turn, parts[index], { whole: data, index });
  const citations = new Citations(data, turn.content, turn.documents, turn.number, pin);
  turn.setTokens(parts[0], citations);
  pin(citations.claims[0]?.index ?? 0);
}

/** Attributes what the user selected in a turn. */
async function explain(turn, chosen) {
  if (generating || !turn.content) return;
  tracing?.abort();
  const mine = (tracing = new AbortController());
  problem("");
  try {
    waiting(true);
    await needTokens(turn, mine.signal);
    const span = turn.spanOf(chosen);
    if (!span) throw new ApiError("This part of the text does not show its tokens; select again.");
    say(`Attributing ${span[1] - span[0]} tokens …`);
    const data = completed(await attribute(selectionBody(turn, span), mine.signal));
    if (mine !== tracing) return;
    show(turn, data);
    if (matchMedia("(max-width: 60rem)").matches) $("result").scrollIntoView({ block: "start" });
  } catch (error) {
    if (mine === tracing) say("");
    failed(error);
  } finally {
    if (mine === tracing) waiting(false);
  }
}

/** Where no attribution came with the answer, the tokens are those of its text. */
async function needTokens(turn, signal) {
  if (turn.pieces) return;
  const data = await attribute(textBody(turn), signal);
  turn.setTokens(completed(data));
}

function completed(data) {
  if (data.status === "completed") return data;
  throw new ApiError(`No attribution: ${data.error?.code ?? data.status}: ${data.error?.message ?? ""}`);
}

/** Shows an attribution, which may be that of one part of a cited answer. */
function show(turn, data, { whole = data, index = null } = {}) {
  for (const other of turns) other.unmark();
  turn.citations?.pin(index);
  turn.mark(data.target.tokens, data.generated);
  shown = { turn, report: new Report(data, turn.first, turn.request.messages), whole };
  if (view !== "all" && view >= data.hops.length) view = "all";
  $("hint").hidden = true;
  $("shown").hidden = false;
  drawTabs();
  draw();
  const seconds = Object.values(data.usage.seconds).reduce((sum, value) => sum + value, 0);
  const { recomputed_tokens: recomputed, cached_tokens: cached } = data.usage;
  // A server may keep to itself what was cached.
  const cost = recomputed === undefined ? "" : `: ${recomputed} tokens recomputed, ${cached} from cache`;
  const { coverage } = whole;
  const part = coverage ? ` Traced through ${coverage.layers.length} of ${coverage.model_layers} layers only.` : "";
  say(`Attributed in ${seconds.toFixed(2)} s${cost}.${part}`);
}

function drawTabs() {
  const views = ["all", ...shown.report.data.hops.keys()];
  const tabs = views.map((name) => {
    const selected = name === view;
    const attributes = { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "report" };
    attributes["aria-selected"] = String(selected);
    attributes.tabindex = selected ? "0" : "-1";
    const tab = el("button", attributes, name === "all" ? "All hops" : `Hop ${shown.report.data.hops[name].hop}`);
    tab.addEventListener("click", () => choose(name));
    return tab;
  });
  $("tabs").replaceChildren(...tabs);
  $("report").setAttribute("aria-labelledby", `tab-${view}`);
}

function choose(name) {
  view = name;
  drawTabs();
  draw();
  $(`tab-${name}`).focus();
}

function draw() {
  if (!shown) return;
  const threshold = Number($("threshold").value);
  const choices = { view, threshold, mode: $("scale").value, whole: $("whole").checked };
  $("report").replaceChildren(...shown.report.render(choices));
  $("report").querySelector("mark")?.setAttribute("tabindex", "0");
  const kept = shown.report.kept(choices);
  const text = `${kept.tokens} of ${kept.of} tokens, ${percent(kept.share)} of the input's mass`;
  $("kept").textContent = threshold ? `from ${number(kept.floor)}: ${text}` : text;
}

function waiting(on) {
  $("result").setAttribute("aria-busy", String(on));
}

function busy(on, text) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  for (const id of ["clear", "example"]) $(id).disabled = on;
  waiting(on);
  if (text) say(text);
}

function clear() {
  tracing?.abort();
  turns.length = 0;
  shown = null;
  view = "all";
  $("turns").replaceChildren();
  documents.draw();
  $("shown").hidden = true;
  $("hint").hidden = false;
  say("");
  problem("");
  $("question").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value;
  if (question.trim()) ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => generating?.abort());
$("clear").addEventListener("click", clear);
$("example").addEventListener("click", () => {
  documents.set(EXAMPLE.documents);
  $("question").value = EXAMPLE.question;
  $("question").focus();
});
$("problem-close").addEventListener("click", () => problem(""));
$("key").addEventListener("change", () => {
  setApiKey($("key").value);
  loadModels();
});
$("tabs").addEventListener("keydown", moveTab);
$("report").addEventListener("keydown", moveMark);
for (const id of ["threshold", "scale", "whole"]) $(id).addEventListener("input", draw);
$("json").addEventListener("click", () => saveJson(shown));
$("html").addEventListener("click", () => saveHtml(shown, $("report")).catch(failed));
$("turns").addEventListener("spoken", (event) => say(event.detail));
watchSelections(() => turns, explain);
loadModels();
