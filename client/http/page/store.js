// Conversations, settings and the key, kept in the browser. What cannot be kept there is kept while the page lasts.
//
// Each conversation is an entry of its own. An entry that is none, or of a kind not known here, is left alone.

import { asConversation, asSettings, titleOf } from "./conversation.js";

const CONVERSATION = "swarm.conversation.";
const SETTINGS = "swarm.settings";
const KEY = "swarm.key";

export class Store {
  #storage;
  #session;
  #summaries = new Map(); // by id, what the list shows
  #unkept = new Map(); // by id, what the browser would not keep

  // `storage` and `session` are the browser's two kinds of Storage, or null where it has none for this page.
  constructor(storage, session) {
    this.#storage = storage;
    this.#session = session;
    for (const key of keysOf(storage)) {
      if (key.startsWith(CONVERSATION)) this.#note(this.#read(key.slice(CONVERSATION.length)));
    }
  }

  // Whether all conversations outlast the page.
  get keepsAll() {
    return this.#unkept.size === 0;
  }

  // The conversations, the newest first, as { id, title, changed }.
  list() {
    return [...this.#summaries.values()].sort((a, b) => b.changed - a.changed);
  }

  load(id) {
    return this.#unkept.has(id) ? asConversation(JSON.parse(this.#unkept.get(id))) : this.#read(id);
  }

  // Whether the conversation is kept by the browser; it is kept here in any case.
  save(conversation) {
    const written = JSON.stringify(conversation);
    const isKept = put(this.#storage, CONVERSATION + conversation.id, written);
    if (isKept) this.#unkept.delete(conversation.id);
    else this.#unkept.set(conversation.id, written);
    this.#note(conversation);
    return isKept;
  }

  remove(id) {
    this.#unkept.delete(id);
    this.#summaries.delete(id);
    put(this.#storage, CONVERSATION + id, null);
  }

  // Takes over what another window has changed; the id of the conversation that this is about, else null.
  heard(event) {
    if (event.key === null || !event.key.startsWith(CONVERSATION)) return null;
    const id = event.key.slice(CONVERSATION.length);
    const conversation = this.#read(id);
    if (conversation) this.#note(conversation);
    else this.#summaries.delete(id);
    return id;
  }

  get settings() {
    return asSettings(parsed(get(this.#storage, SETTINGS)));
  }

  set settings(settings) {
    put(this.#storage, SETTINGS, JSON.stringify(settings));
  }

  get key() {
    return get(this.#session, KEY) || get(this.#storage, KEY) || "";
  }

  // Keeps the API key: while this tab is open, or `forLong`.
  setKey(key, forLong) {
    put(this.#session, KEY, key);
    put(this.#storage, KEY, forLong ? key : null);
  }

  #read(id) {
    const conversation = asConversation(parsed(get(this.#storage, CONVERSATION + id)));
    return conversation?.id === id ? conversation : null;
  }

  #note(conversation) {
    if (!conversation) return;
    const { id, changed } = conversation;
    this.#summaries.set(id, { id, title: titleOf(conversation), changed });
  }
}

// The browser's storage of that name, null where the page may not have it.
export function storageOf(name) {
  try {
    return window[name];
  } catch {
    return null;
  }
}

function keysOf(storage) {
  try {
    return Object.keys(storage ?? {});
  } catch {
    return [];
  }
}

function get(storage, key) {
  try {
    return storage?.getItem(key) ?? null;
  } catch {
    return null;
  }
}

// Writes `value`, or takes the entry away where it is null; false where the browser refuses.
function put(storage, key, value) {
  try {
    if (value === null) storage.removeItem(key);
    else storage.setItem(key, value);
    return true;
  } catch {
    return false;
  }
}

function parsed(written) {
  try {
    return JSON.parse(written);
  } catch {
    return null;
  }
}
