// The page: puts its parts together, and knows which conversation is shown and which answers are being written.

import { Answering } from "./answering.js";
import { modelOf } from "./api.js";
import { Composer } from "./composer.js";
import { messagesFor, newAnswer, newConversation, newTurn, parametersOf, shownAnswer, titleOf } from "./conversation.js";
import { h, icon } from "./dom.js";
import { endingWords, say } from "./say.js";
import { KeyDialog, SettingsDialog } from "./settings.js";
import { Side } from "./side.js";
import { Store, storageOf } from "./store.js";
import { Thread } from "./thread.js";
import { changeWords } from "./words.js";

const SAVE_MS = 1000; // while an answer is written it is saved so often
const NEARLY_FULL = 0.8; // of the model's context
const EXAMPLES = ["What is a prime number?", "Write a haiku about a river.", "Explain recursion with a short example in Python."];

const place = (id) => document.getElementById(id);

class Page {
  #store = new Store(storageOf("localStorage"), storageOf("sessionStorage"));
  #current;
  #running = new Map(); // by conversation id: { conversation, answering, said, saving }
  #removed = null; // the conversation that may be brought back
  #model = null;
  #isDrawing = false;
  #drafts = new Map();
  #onKey = () => {}; // what is done once there is a key

  constructor() {
    this.thread = new Thread(place("thread"), place("to-end"), {
      edit: (question) => this.edit(question),
      redo: () => this.redo(),
      show: (turn, version) => this.show(turn, version),
    });
    this.side = new Side(place("conversations"), {
      open: (id) => this.go(id),
      rename: (id, title) => this.rename(id, title),
      remove: (id) => this.remove(id),
      restore: (id) => this.restore(id),
    });
    this.composer = new Composer(place("composer"), {
      send: (text) => this.send(text),
      stop: () => this.stop(),
      edit: () => this.thread.edit(),
    });
    this.settings = new SettingsDialog(place("settings"), (settings) => this.change(settings));
    this.key = new KeyDialog(place("ask-key"), (key, forLong) => {
      this.#store.setKey(key, forLong);
      this.#onKey();
    });
    this.#furnish();
    addEventListener("hashchange", () => this.open(location.hash.slice(1)));
    addEventListener("storage", (event) => this.#heard(event));
    addEventListener("pagehide", () => this.#leave());
    addEventListener("pageshow", (event) => event.persisted && this.open(location.hash.slice(1)));
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.#escape();
    });
    this.open(location.hash.slice(1));
    this.connect();
  }

  // Which model there is, or why that is not known.
  async connect() {
    this.#tellModel("connecting", "Connecting…");
    try {
      await this.#known();
      place("banner").hidden = true;
    } catch (failure) {
      this.#tellModel("lost", failure.needsKey ? "Needs a key" : "Not reached");
      if (failure.needsKey) {
        this.#askKey(failure.message, () => this.connect());
      } else {
        place("banner").hidden = false;
        place("banner").firstElementChild.textContent = failure.message;
      }
    }
  }

  // Shows a conversation; a new one where there is none of that id.
  open(id) {
    if (this.#current) this.#drafts.set(this.#current.id, this.composer.draft);
    this.#current = this.#running.get(id)?.conversation ?? (id && this.#store.load(id)) ?? null;
    this.#current ||= newConversation(this.#store.settings);
    this.composer.draft = this.#drafts.get(this.#current.id) ?? "";
    this.draw();
    this.thread.end();
  }

  // Goes to a conversation as to another page.
  go(id) {
    if (id !== this.#current.id) history.pushState(null, "", `#${id}`);
    if (id !== this.#current.id) this.open(id);
    this.#closeSide();
    this.#focus();
  }

  begin() {
    this.side.forget();
    history.pushState(null, "", location.pathname + location.search);
    this.open("");
    this.#closeSide();
    this.composer.focus();
  }

  send(text) {
    if (this.#running.has(this.#current.id)) return false;
    this.#current.turns.push(newTurn(text));
    if (location.hash.slice(1) !== this.#current.id) history.replaceState(null, "", `#${this.#current.id}`);
    this.side.forget();
    this.#ask();
    this.thread.end();
    return true;
  }

  // Asks the last question in other words.
  edit(question) {
    const turn = this.#current.turns.at(-1);
    Object.assign(turn, newTurn(question));
    this.#ask();
    this.composer.focus();
  }

  // Another answer to the last question.
  redo() {
    this.#ask();
    this.composer.focus();
  }

  stop() {
    this.#running.get(this.#current.id)?.answering.stop();
  }

  show(turn, version) {
    turn.shown = version;
    this.#save(this.#current);
    this.draw();
  }

  rename(id, title) {
    const conversation = this.#loaded(id);
    if (!conversation) return;
    conversation.title = title;
    this.#store.save(conversation);
    this.draw();
  }

  remove(id) {
    this.#removed = this.#loaded(id);
    this.#running.get(id)?.answering.stop();
    this.#running.delete(id);
    this.#store.remove(id);
    say(`Deleted ${titleOf(this.#removed ?? { turns: [] })}.`);
    if (id === this.#current.id) {
      history.replaceState(null, "", location.pathname + location.search);
      this.open("");
    }
    this.draw();
  }

  restore(id) {
    if (this.#removed?.id !== id) return;
    this.#store.save(this.#removed);
    this.#removed = null;
    this.go(id);
    this.draw();
  }

  change(settings) {
    this.#store.settings = settings;
    this.#current.settings = settings;
    if (this.#current.turns.length) this.#save(this.#current);
  }

  // Brings the page to what is so now.
  draw() {
    const conversation = this.#current;
    const title = titleOf(conversation);
    const isNew = conversation.turns.length === 0;
    place("title").textContent = title;
    document.title = isNew ? "Swarm chat" : `${title} · Swarm chat`;
    place("welcome").hidden = !isNew;
    this.thread.update(conversation.turns);
    this.side.update(this.#store.list(), conversation.id, new Set(this.#running.keys()));
    this.composer.isAnswering = this.#running.has(conversation.id);
    place("unkept").hidden = this.#store.keepsAll;
    this.#drawFullness();
  }

  async #ask() {
    const conversation = this.#current;
    const turn = conversation.turns.at(-1);
    if (shownAnswer(turn)?.text === "") turn.answers.splice(turn.shown, 1);
    const answer = newAnswer();
    turn.shown = turn.answers.push(answer) - 1;
    const answering = new Answering(answer, () => this.#onChange(run));
    const run = { conversation, answering, said: 0, saving: 0 };
    this.#running.set(conversation.id, run);
    conversation.changed = Date.now();
    this.#save(conversation);
    this.draw();
    say("Answering.");
    const messages = messagesFor(conversation, conversation.turns.length - 1);
    await answering.run(async () => {
      const { id } = await this.#known();
      return { request: { model: id, messages, ...parametersOf(conversation.settings) }, key: this.#store.key };
    });
    this.#end(run);
  }

  #onChange(run) {
    this.#sayChanges(run);
    run.saving ||= setTimeout(() => {
      run.saving = 0;
      if (this.#running.get(run.conversation.id) === run) this.#save(run.conversation);
    }, SAVE_MS);
    if (run.conversation !== this.#current || this.#isDrawing) return;
    this.#isDrawing = true;
    requestAnimationFrame(() => {
      this.#isDrawing = false;
      this.thread.update(this.#current.turns);
    });
  }

  // Reads out what became of the route since that was read out last.
  #sayChanges(run) {
    const { route, state } = run.answering.answer;
    const news = (route?.changes ?? []).map((change) => changeWords(change, null, state !== "writing"));
    const fresh = news.at(-1);
    if (fresh && fresh !== run.said) say(fresh);
    run.said = fresh;
  }

  #end(run) {
    const { conversation, answering } = run;
    clearTimeout(run.saving);
    if (this.#running.get(conversation.id) !== run) return; // it was deleted meanwhile
    this.#running.delete(conversation.id);
    this.#save(conversation);
    if (answering.failure?.needsKey) {
      this.#model = null;
      this.#askKey(answering.failure.message, () => {
        if (this.#current === conversation) this.redo();
        else this.connect();
      });
    }
    this.draw();
    if (conversation === this.#current) say(endingWords(answering.answer));
  }

  // The page ends, and the answers that are being written with it: they are kept as far as they came.
  #leave() {
    for (const { conversation } of this.#running.values()) this.#store.save(conversation);
    this.#running.clear();
  }

  // The model, once the server has told it.
  async #known() {
    if (!this.#model) {
      this.#model = await modelOf(this.#store.key);
      this.#tellModel("ready", this.#model.id);
      place("banner").hidden = true;
    }
    return this.#model;
  }

  #askKey(words, onKey) {
    this.#onKey = onKey;
    this.key.open(words);
  }

  #save(conversation) {
    this.#store.save(conversation);
    place("unkept").hidden = this.#store.keepsAll;
  }

  #loaded(id) {
    if (id === this.#current.id) return this.#current;
    return this.#running.get(id)?.conversation ?? this.#store.load(id);
  }

  // Another window has changed something.
  #heard(event) {
    const id = this.#store.heard(event);
    if (id === null) return;
    if (id === this.#current.id && !this.#running.has(id)) this.#current = this.#store.load(id) ?? this.#current;
    this.draw();
  }

  #tellModel(state, text) {
    place("model").dataset.state = state;
    place("model").firstElementChild.textContent = text;
    place("model").title = text;
  }

  // How full the model's context is, once that matters.
  #drawFullness() {
    const route = this.#current.turns.length ? shownAnswer(this.#current.turns.at(-1))?.route : null;
    const share = route && this.#model ? (route.prompt_tokens + route.completion_tokens) / this.#model.max_model_len : 0;
    place("full").textContent = `This conversation fills ${Math.min(100, Math.round(100 * share))} % of what the model can read.`;
    place("full").hidden = share <= NEARLY_FULL;
    place("hint").hidden = share > NEARLY_FULL;
  }

  #furnish() {
    document.querySelector(".skip").addEventListener("click", (event) => {
      event.preventDefault(); // what follows # is the conversation
      this.composer.focus();
    });
    place("new").prepend(icon("new"));
    place("new").addEventListener("click", () => this.begin());
    place("open-side").append(icon("menu"));
    place("open-side").addEventListener("click", () => this.#openSide());
    place("close-side").append(icon("close"));
    place("close-side").addEventListener("click", () => this.#escape());
    place("veil").addEventListener("click", () => this.#escape());
    place("open-settings").append(icon("settings"));
    place("open-settings").addEventListener("click", () => this.settings.open(this.#current.settings));
    place("to-end").append(icon("down"));
    place("banner").lastElementChild.addEventListener("click", () => this.connect());
    place("unkept").textContent = "This browser does not keep all conversations: its storage is full or switched off. They last as long as this page; delete some to make room.";
    const examples = EXAMPLES.map((text) => h("li", {}, h("button", { type: "button", class: "plain", click: () => this.send(text) && this.composer.focus() }, text)));
    place("welcome").append(
      h("h2", {}, "Ask the swarm"),
      h("p", {}, "Several servers compute each answer together, each a part of the model. Beside it you see which."),
      h("ul", {}, ...examples));
  }

  #openSide() {
    document.body.classList.add("side-open");
    place("open-side").setAttribute("aria-expanded", "true");
    place("page").inert = true;
    place("veil").hidden = false;
    place("close-side").focus();
  }

  #closeSide() {
    document.body.classList.remove("side-open");
    place("open-side").setAttribute("aria-expanded", "false");
    place("page").inert = false;
    place("veil").hidden = true;
  }

  // Closes the list of conversations where that lies over the page; else stops the answer.
  #escape() {
    if (document.body.classList.contains("side-open")) {
      this.#closeSide();
      place("open-side").focus();
    } else {
      this.stop();
    }
  }

  // Where one writes; where that would open a keyboard over the page, where one reads.
  #focus() {
    if (matchMedia("(pointer: coarse)").matches) place("title").focus();
    else this.composer.focus();
  }
}

new Page();
