// Bodies of the requests that the page sends.
// An attribution of a selection names the very token ids that were generated, so that its
// span means what was selected.

import { $ } from "./dom.js";

const VERIFIED = 2; // Sources of each part.
// Everything that the page draws; `tokens` and `generated` make selections exact.
const EVERYTHING = { top_k: null, include: ["hops", "generated", "segments", "tokens"] };

function options() {
  const hops = $("hops").value;
  return { hops: hops === "auto" ? hops : Number(hops), recurse_over: $("over").value };
}

/** Asks for citations where there is something to cite. */
export function chatBody(turn) {
  const sources = turn.documents.map(({ number, title, message, span }) => ({ id: String(number), title, message, span }));
  const cited = { sources, citations: true, verify: $("verify").checked ? VERIFIED : 0 };
  return {
    ...turn.request,
    max_tokens: Number($("tokens").value),
    temperature: Number($("temperature").value),
    flashtrace: { ...EVERYTHING, ...options(), ...(sources.length ? cited : { target: "output" }) },
  };
}

/** Attributes a span of a turn's generated tokens. */
export function selectionBody(turn, span) {
  const reasoning = turn.reasoningSpan;
  return {
    model: turn.request.model,
    prompt: turn.first.scores.map((score) => score.token_id),
    completion: turn.tokenIds,
    flashtrace: {
      ...EVERYTHING,
      ...options(),
      target: { tokens: [span] },
      ...(reasoning ? { reasoning: { tokens: [reasoning] } } : {}),
    },
  };
}

/** Attributes all of a turn's text, for its tokens: none came with the answer. */
export function textBody(turn) {
  const answer = { role: "assistant", content: turn.content };
  if (turn.reasoning) answer.reasoning_content = turn.reasoning;
  const { model, messages } = turn.request;
  return {
    model,
    messages: [...messages, answer],
    flashtrace: { ...EVERYTHING, target: "generated", hops: 0 },
  };
}
