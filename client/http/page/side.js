// The list of conversations: opened, renamed, deleted, and brought back.

import { button, h, icon } from "./dom.js";

// Shows the list in `element`. `on` says what is done: `open(id)`, `rename(id, title)`, `remove(id)`, `restore(id)`.
export class Side {
  #element;
  #on;
  #list = [];
  #current = null;
  #busy = new Set();
  #removed = null; // { id, title, at } of what may be brought back
  #renaming = null;

  constructor(element, on) {
    this.#element = element;
    this.#on = on;
  }

  // `list` are summaries, the newest first; conversations in `busy` are being answered.
  update(list, current, busy) {
    this.#list = list;
    this.#current = current;
    this.#busy = busy;
    if (!this.#renaming) this.#draw();
  }

  #draw() {
    const focused = this.#element.contains(document.activeElement) && document.activeElement.dataset.what;
    const entries = this.#list.map((one) => this.#entry(one));
    if (this.#removed) entries.splice(Math.min(this.#removed.at, entries.length), 0, this.#undo());
    this.#element.replaceChildren(...entries);
    if (focused) this.#element.querySelector(`[data-what="${CSS.escape(focused)}"]`)?.focus();
  }

  #entry({ id, title }) {
    if (this.#renaming === id) return this.#renameField(id, title);
    const open = h("button", {
      type: "button",
      class: "open",
      "aria-current": id === this.#current ? "page" : null,
      "data-what": `open ${id}`,
      click: () => this.#on.open(id),
    }, h("bdi", { class: "cut" }, title), this.#busy.has(id) && h("span", { class: "busy" }, h("span", { class: "unseen" }, ", being answered")));
    return h("li", {}, open,
      button(`Rename ${title}`, "pencil", () => this.#rename(id), { "data-what": `rename ${id}` }),
      button(`Delete ${title}`, "bin", () => this.#remove(id, title), { "data-what": `remove ${id}` }));
  }

  #rename(id) {
    this.#renaming = id;
    this.#draw();
    this.#element.querySelector("input").select();
  }

  #renameField(id, title) {
    const field = h("input", { type: "text", "aria-label": "Name of the conversation", maxlength: "120" });
    field.value = title;
    const end = (isKept) => {
      if (this.#renaming !== id) return;
      this.#renaming = null;
      if (isKept && field.value.trim()) this.#on.rename(id, field.value.trim());
      this.#draw();
      this.#element.querySelector(`[data-what="open ${CSS.escape(id)}"]`)?.focus();
    };
    field.addEventListener("blur", () => end(true));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) {
        event.preventDefault(); // or what has the focus then would be pressed
        end(true);
      }
      if (event.key === "Escape") { event.stopPropagation(); end(false); }
    });
    return h("li", { class: "renaming" }, field);
  }

  #remove(id, title) {
    this.#removed = { id, title, at: this.#list.findIndex((one) => one.id === id) };
    this.#on.remove(id);
    this.#draw();
    this.#element.querySelector(".undo button")?.focus();
  }

  #undo() {
    const { id, title } = this.#removed;
    const undo = h("button", { type: "button", class: "plain", click: () => {
      this.#removed = null;
      this.#on.restore(id);
      this.#element.querySelector(`[data-what="open ${CSS.escape(id)}"]`)?.focus();
    } }, "Undo");
    return h("li", { class: "undo" }, icon("bin"), h("span", { class: "cut" }, "Deleted “", h("bdi", {}, title), "”"), undo);
  }

  // What was deleted cannot be brought back any more.
  forget() {
    this.#removed = null;
  }
}
