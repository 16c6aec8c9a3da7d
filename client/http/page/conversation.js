// A conversation as data: turns of a question and its answers, and how the model is to answer. Pure.
//
// A turn's `answers` are its versions, `shown` the number of the one that counts. An answer's `state` is
// "writing", "done", "stopped", "failed" or "cut", when the page was left meanwhile; `route` is what the server told last of who computed it, and
// `pauses` the seconds for which each of the route's changes held the answer up, null where that is unknown.

const TITLE = 60;
const STATES = ["done", "stopped", "failed", "cut"];

// How the model may be told to answer: the API's own parameters, with their bounds.
export const PARAMETERS = {
  temperature: { least: 0, most: 2 },
  top_p: { least: 0.01, most: 1 },
  top_k: { least: 1, most: 2 ** 31 - 1, whole: true },
  min_p: { least: 0, most: 1 },
  max_tokens: { least: 1, most: 2 ** 31 - 1, whole: true },
  seed: { least: 0, most: Number.MAX_SAFE_INTEGER, whole: true },
  repetition_penalty: { least: 0.01, most: 100 },
  presence_penalty: { least: -2, most: 2 },
  frequency_penalty: { least: -2, most: 2 },
};

export const DEFAULTS = { system: "", temperature: 0.7 };

export function newConversation(settings, now = Date.now()) {
  return { id: newId(), title: "", changed: now, settings: { ...settings }, turns: [] };
}

export function newTurn(question) {
  return { question, answers: [], shown: 0 };
}

export function newAnswer() {
  return { text: "", state: "writing", error: "", finish: "", route: null, pauses: [] };
}

export function shownAnswer(turn) {
  return turn.answers[turn.shown] ?? null;
}

// What people call a conversation: the name they gave it, or the beginning of what they asked first.
export function titleOf(conversation) {
  const first = conversation.turns[0]?.question.trim().replace(/\s+/g, " ") ?? "";
  const short = first.length > TITLE ? `${first.slice(0, TITLE - 1)}…` : first;
  return conversation.title || short || "New conversation";
}

// What is sent to the model for turn number `at`: all before it that was answered, then its question.
export function messagesFor(conversation, at) {
  const system = conversation.settings.system?.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of conversation.turns.slice(0, at)) {
    const answer = shownAnswer(turn);
    if (!answer?.text) continue;
    messages.push({ role: "user", content: turn.question }, { role: "assistant", content: answer.text });
  }
  messages.push({ role: "user", content: conversation.turns[at].question });
  return messages;
}

// The parameters of a request that `settings` ask for.
export function parametersOf(settings) {
  const names = Object.keys(PARAMETERS).filter((name) => settings[name] != null);
  return Object.fromEntries(names.map((name) => [name, settings[name]]));
}

// What of `value` is a conversation, whatever it is; null if nothing.
export function asConversation(value) {
  if (!isObject(value) || typeof value.id !== "string" || !Array.isArray(value.turns)) return null;
  return {
    id: value.id,
    title: text(value.title),
    changed: Number.isFinite(value.changed) ? value.changed : 0,
    settings: asSettings(value.settings),
    turns: value.turns.filter(isObject).map(asTurn),
  };
}

export function asSettings(value) {
  const given = isObject(value) ? value : DEFAULTS;
  const settings = { system: text(given.system) };
  for (const [name, { least, most, whole }] of Object.entries(PARAMETERS)) {
    const number = given[name];
    const fits = whole ? Number.isSafeInteger(number) : Number.isFinite(number);
    if (fits && number >= least && number <= most) settings[name] = number;
  }
  return settings;
}

function asTurn(value) {
  const answers = Array.isArray(value.answers) ? value.answers.filter(isObject).map(asAnswer) : [];
  const shown = Number.isInteger(value.shown) && value.shown >= 0 && value.shown < answers.length ? value.shown : 0;
  return { question: text(value.question), answers, shown };
}

function asAnswer(value) {
  return {
    text: text(value.text),
    state: STATES.includes(value.state) ? value.state : "cut",
    error: text(value.error),
    finish: text(value.finish),
    route: asRoute(value.route),
    pauses: Array.isArray(value.pauses) ? value.pauses.map((one) => (Number.isFinite(one) ? one : null)) : [],
  };
}

// A route as the API tells it, with everything in it that is shown.
export function asRoute(value) {
  if (!isObject(value) || !Array.isArray(value.hops)) return null;
  const counts = ["prompt_tokens", "cached_tokens", "completion_tokens", "ttft_ms", "tokens_per_s", "replayed_tokens"];
  const changes = Array.isArray(value.changes) ? value.changes.filter(isObject) : [];
  return {
    ...numbers(value, counts),
    hops: value.hops.filter(isObject).map((hop) => ({ ...asPlace(hop), ...numbers(hop, ["steps", "rtt_ms", "queue_ms", "compute_ms"]) })),
    changes: changes.map((change) => ({
      blocks: asBlocks(change.blocks),
      reason: text(change.reason),
      from: asPlaces(change.from),
      to: asPlaces(change.to),
    })),
    speculation: numbers(isObject(value.speculation) ? value.speculation : {}, ["drafted", "accepted", "steps"]),
  };
}

function asPlaces(value) {
  return Array.isArray(value) ? value.filter(isObject).map(asPlace) : [];
}

function asPlace(value) {
  return { peer: text(value.peer), name: text(value.name), blocks: asBlocks(value.blocks) };
}

function asBlocks(value) {
  const [start, end] = Array.isArray(value) ? value : [];
  return Number.isInteger(start) && Number.isInteger(end) && start < end ? [start, end] : [0, 1];
}

function numbers(value, names) {
  return Object.fromEntries(names.map((name) => [name, Number.isFinite(value[name]) ? value[name] : 0]));
}

function text(value) {
  return typeof value === "string" ? value : "";
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
