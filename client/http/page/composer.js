// Where a message is written and sent, and a running answer stopped.

import { icon } from "./dom.js";

// Runs the form. `on` says what is done: `send(text)`, whether it was taken, `stop()` and `edit()` of the last question.
export class Composer {
  #form;
  #field;
  #button;
  #on;
  #isAnswering = false;

  constructor(form, on) {
    this.#form = form;
    this.#field = form.querySelector("textarea");
    this.#button = form.querySelector("button");
    this.#on = on;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#field.addEventListener("input", () => this.#draw());
    this.#field.addEventListener("keydown", (event) => this.#onKey(event));
    this.#draw();
  }

  // What is written there.
  get draft() {
    return this.#field.value;
  }

  set draft(text) {
    this.#field.value = text;
    this.#draw();
  }

  set isAnswering(isAnswering) {
    if (isAnswering === this.#isAnswering) return;
    this.#isAnswering = isAnswering;
    this.#draw();
  }

  focus() {
    this.#field.focus();
  }

  #submit() {
    if (this.#isAnswering) {
      this.#on.stop();
      return;
    }
    const text = this.#field.value.trim();
    if (text && this.#on.send(text)) this.draft = "";
  }

  #onKey(event) {
    if (event.isComposing) return;
    const isTyping = matchMedia("(pointer: coarse)").matches; // there, Enter is for a new line
    if (event.key === "Enter" && !event.shiftKey && !isTyping) {
      event.preventDefault();
      if (!this.#isAnswering) this.#submit();
    }
    if (event.key === "ArrowUp" && this.#field.value === "" && !this.#isAnswering) {
      event.preventDefault();
      this.#on.edit();
    }
  }

  #draw() {
    const label = this.#isAnswering ? "Stop" : "Send";
    if (this.#button.getAttribute("aria-label") !== label) {
      this.#button.setAttribute("aria-label", label);
      this.#button.title = label;
      this.#button.replaceChildren(icon(this.#isAnswering ? "stop" : "send"));
    }
    this.#button.classList.toggle("ready", this.#isAnswering || this.#field.value.trim() !== "");
    // as high as its text, up to what the style allows
    this.#field.style.height = "auto";
    this.#field.style.height = `${this.#field.scrollHeight}px`;
    this.#form.classList.toggle("answering", this.#isAnswering);
  }
}
