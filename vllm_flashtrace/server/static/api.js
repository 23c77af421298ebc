// Calls to the server's own OpenAI-compatible routes.
// The API key lives in this module's memory alone, and every failure is an ApiError whose
// message can be shown to the user.

const BASE = new URL("../v1/", import.meta.url);
let apiKey = "";

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function setApiKey(value) {
  apiKey = value.trim();
}

/** Names of the served models. */
export async function models() {
  const answer = await (await call("models", { method: "GET" })).json();
  return answer.data.map((model) => model.id);
}

/** Attributes text that exists; the `flashtrace` object. */
export async function attribute(body, signal) {
  return await (await post("attributions", body, signal)).json();
}

/** The parsed events of a streamed chat completion. */
export async function* streamChat(body, signal) {
  const response = await post("chat/completions", { ...body, stream: true }, signal);
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(described(event.error, "the stream broke off"));
    yield event;
  }
  throw new ApiError("The stream ended before it was complete.");
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function call(path, options) {
  const headers = { ...options.headers };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // fetch refuses a key that no header can hold, without a request.
    throw new ApiError(`The server cannot be reached (${error.message}).`);
  }
  if (!response.ok) throw new ApiError(await reason(response), response.status);
  return response;
}

async function reason(response) {
  if (response.status === 401) return "The server asks for an API key: see Settings.";
  const text = await response.text();
  const fallback = `${response.status} ${response.statusText}`;
  try {
    const body = JSON.parse(text);
    return described(body.error ?? body, fallback);
  } catch {
    return text.slice(0, 500) || fallback;
  }
}

function described(error, fallback) {
  if (typeof error === "string") return error;
  return error.message ?? error.detail ?? fallback;
}

async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (block.startsWith("data: ")) yield block.slice(6);
      }
    }
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(`The connection broke off (${error.message}).`);
  } finally {
    reader.cancel().catch(() => {});
  }
}
