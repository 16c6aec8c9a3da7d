// Asking the API that serves this page, and what its refusals are in words.

import { eventsOf } from "./events.js";
import { counted } from "./words.js";

const CHAT = "v1/chat/completions";
const MODELS = "v1/models";

const CAUSES = { 429: "The swarm is busy.", 503: "The swarm cannot answer now." };

// Why there is no answer, in words. `needsKey` says that a key would help.
export class Failure extends Error {
  constructor(message, needsKey = false) {
    super(message);
    this.needsKey = needsKey;
  }
}

// The model that the server has: { id, max_model_len }.
export async function modelOf(key) {
  const answer = await asked(MODELS, key, {});
  try {
    const [model] = (await answer.json()).data;
    if (typeof model.id === "string") return model;
  } catch {
    // it is no list of models
  }
  throw new Failure("What answers here is no API of a swarm.");
}

// The chunks of a streamed answer to `request`, until it is complete. Throws a Failure, or an AbortError.
export async function* chunksOf(request, key, signal) {
  const answer = await asked(CHAT, key, {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_route: true } }),
  });
  try {
    for await (const data of eventsOf(answer.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(sentence(chunk.error.message));
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
  }
  throw new Failure("The connection broke before the answer was complete.");
}

async function asked(path, key, options) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(navigator.onLine ? "The server of this page cannot be reached. It may have been stopped." : "There is no network.");
  }
  if (!answer.ok) throw await refusal(answer, key);
  return answer;
}

async function refusal(answer, key) {
  const { status, headers } = answer;
  if (status === 401) {
    return new Failure(key ? "The server does not know this API key." : "The server asks for an API key.", true);
  }
  const { message, code } = await answer.json().then((body) => body.error, () => null) ?? {};
  if (code === "context_length_exceeded") return new Failure("This conversation is longer than the model can read. Begin a new one.");
  const why = sentence(message || `The server refused with status ${status}`).replace(/ ?Try again soon\.$/, "");
  const wait = Number(headers.get("Retry-After"));
  const when = wait > 0 ? `Try again in about ${counted(wait, "second")}.` : "";
  return new Failure([CAUSES[status], why, when].filter(Boolean).join(" "));
}

function sentence(text) {
  const trimmed = String(text ?? "").trim();
  return /[.!?…]$/.test(trimmed) || !trimmed ? trimmed : `${trimmed}.`;
}
