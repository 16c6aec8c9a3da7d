// The dialogs: how the model is to answer, and the key that the server may ask for.

import { DEFAULTS, PARAMETERS } from "./conversation.js";
import { h } from "./dom.js";

const FIELDS = [
  ["temperature", "Temperature", "0 always takes the likeliest word, 2 takes wild ones.", "1"],
  ["max_tokens", "Most tokens", "Where an answer ends at the latest.", "as the server says"],
  ["top_p", "Top-p", "Choose among the likeliest words that make up this share.", "1"],
  ["top_k", "Top-k", "Choose among so many of the likeliest words.", "all"],
  ["min_p", "Min-p", "Leave out what is less likely than this share of the best.", "0"],
  ["seed", "Seed", "The same seed gives the same answer again.", "a new one each time"],
  ["repetition_penalty", "Repetition penalty", "Above 1, repeat less of all that was said.", "1"],
  ["presence_penalty", "Presence penalty", "Above 0, say something new.", "0"],
  ["frequency_penalty", "Frequency penalty", "Above 0, repeat words less often.", "0"],
];

// Lets people change `settings`; `onChange` is told the new ones.
export class SettingsDialog {
  #dialog;
  #form;

  constructor(dialog, onChange) {
    this.#dialog = dialog;
    this.#form = h("form", { method: "dialog" },
      h("h2", { id: "settings-name" }, "Settings"),
      h("p", { class: "quiet" }, "For this conversation, and those that you begin after it."),
      field("system", "System prompt", "What the model is told before everything else.",
        h("textarea", { id: "set-system", name: "system", rows: "3", "aria-describedby": "about-system" })),
      h("div", { class: "fields" }, ...FIELDS.map(numberField)),
      h("div", { class: "buttons" },
        h("button", { type: "button", class: "plain", click: () => this.#fill(DEFAULTS) }, "Reset"),
        h("span", { class: "space" }),
        h("button", { type: "button", class: "plain", click: () => dialog.close() }, "Cancel"),
        h("button", { type: "submit", class: "main" }, "Save")));
    this.#form.addEventListener("submit", () => onChange(this.#read()));
    dialog.append(this.#form);
    closesOutside(dialog);
  }

  open(settings) {
    this.#fill(settings);
    this.#dialog.showModal();
  }

  #fill(settings) {
    this.#form.elements.system.value = settings.system ?? "";
    for (const name of Object.keys(PARAMETERS)) this.#form.elements[name].value = settings[name] ?? "";
  }

  #read() {
    const settings = { system: this.#form.elements.system.value };
    for (const name of Object.keys(PARAMETERS)) {
      const { value, valueAsNumber } = this.#form.elements[name];
      if (value !== "") settings[name] = valueAsNumber;
    }
    return settings;
  }
}

// Asks for the API key; `onKey(key, forLong)` is told it.
export class KeyDialog {
  #dialog;
  #words = h("p", { class: "quiet", id: "about-key" });
  #key = h("input", { id: "key", type: "password", autocomplete: "off", spellcheck: "false", required: true, "aria-describedby": "about-key" });

  constructor(dialog, onKey) {
    this.#dialog = dialog;
    const remember = h("input", { id: "remember", type: "checkbox" });
    const form = h("form", { method: "dialog" },
      h("h2", { id: "key-name" }, "API key"),
      this.#words,
      h("div", { class: "field" }, h("label", { for: "key" }, "Key"), this.#key),
      h("div", { class: "check" }, remember, h("label", { for: "remember" }, "Remember it in this browser, not only in this tab")),
      h("div", { class: "buttons" },
        h("button", { type: "button", class: "plain", click: () => dialog.close() }, "Cancel"),
        h("button", { type: "submit", class: "main" }, "Use it")));
    form.addEventListener("submit", () => onKey(this.#key.value.trim(), remember.checked));
    dialog.append(form);
    closesOutside(dialog);
  }

  open(words) {
    this.#words.textContent = words;
    this.#key.value = "";
    if (!this.#dialog.open) this.#dialog.showModal();
  }
}

function numberField([name, label, about, placeholder]) {
  const { least, most, whole } = PARAMETERS[name];
  const input = h("input", {
    id: `set-${name}`,
    name,
    type: "number",
    inputmode: whole ? "numeric" : "decimal",
    min: least,
    max: most,
    step: whole ? 1 : "any",
    placeholder,
    "aria-describedby": `about-${name}`,
  });
  return field(name, label, about, input);
}

function field(name, label, about, control) {
  return h("div", { class: "field" },
    h("label", { for: `set-${name}` }, label),
    control,
    h("p", { class: "quiet", id: `about-${name}` }, about));
}

// A click beside a dialog closes it.
function closesOutside(dialog) {
  dialog.addEventListener("mousedown", (event) => {
    if (event.target !== dialog) return;
    const box = dialog.getBoundingClientRect();
    const isInside = event.clientX >= box.left && event.clientX <= box.right && event.clientY >= box.top && event.clientY <= box.bottom;
    if (!isInside) dialog.close();
  });
}
