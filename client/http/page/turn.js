// One turn on the page: a question, its answer, what became of that, and what may be done with either.

import { shownAnswer } from "./conversation.js";
import { button, copyButton, h } from "./dom.js";
import { RouteView } from "./route.js";
import { MarkdownView } from "./show_markdown.js";
import { changeWords } from "./words.js";

// Shows one turn. `on` says what is done: `edit(question)`, `redo()` and `show(version)`.
export class TurnView {
  #turn;
  #on;
  #isLast = false;
  #answer; // the one that is shown
  #text;
  #route;
  #bubble = h("div", { class: "bubble", dir: "auto" });
  #asked = h("div", { class: "actions" });
  #changes = h("ul", { class: "changes" });
  #note = h("p", { class: "note" });
  #body = h("div", { class: "body" });
  #actions = h("div", { class: "actions" });
  #answered = h("div", { class: "answer" });

  constructor(turn, on) {
    this.#turn = turn;
    this.#on = on;
    this.element = h("div", { class: "turn" },
      h("div", { class: "question" }, h("h2", { class: "unseen" }, "You"), this.#bubble, this.#asked),
      this.#answered);
  }

  // Shows the turn as it is now; only the last one may be edited and answered anew.
  update({ isLast, opensRoute }) {
    const answer = shownAnswer(this.#turn);
    if (answer !== this.#answer || !this.#text) this.#begin(answer, opensRoute);
    if (isLast !== this.#isLast && !isLast) this.#route.element.open = false;
    this.#isLast = isLast;
    this.#text.update(answer?.text ?? "");
    this.#route.update(answer ?? { route: null });
    this.#showChanges(answer);
    this.#showNote(answer);
    this.#showActions(answer);
    this.#body.classList.toggle("writing", answer?.state === "writing");
    this.#body.classList.toggle("waiting", answer?.state === "writing" && !answer.text);
  }

  #begin(answer, opensRoute) {
    this.#answer = answer;
    this.#text = new MarkdownView();
    this.#route = new RouteView();
    this.#route.element.open = opensRoute;
    this.#bubble.textContent = this.#turn.question;
    this.#body.replaceChildren(this.#text.element, this.#changes, this.#note);
    this.#answered.replaceChildren(h("h2", { class: "unseen" }, "Answer"), this.#body, this.#route.element, this.#actions);
    this.#actions.dataset.of = this.#asked.dataset.of = "";
  }

  #showChanges(answer) {
    const hasEnded = answer?.state !== "writing";
    const lines = (answer?.route?.changes ?? []).map((change, at) => ({
      text: changeWords(change, answer.pauses[at] ?? null, hasEnded),
      state: change.to.length ? "moved" : hasEnded ? "gone" : "looking",
    }));
    lines.forEach(({ text, state }, at) => {
      const line = this.#changes.children[at] ?? this.#changes.appendChild(h("li"));
      line.className = state;
      if (line.textContent !== text) line.textContent = text;
    });
    while (this.#changes.children.length > lines.length) this.#changes.lastChild.remove();
  }

  #showNote(answer) {
    const notes = {
      failed: answer?.error,
      stopped: "Stopped here.",
      cut: "The answer ends here: the page was left while it was written.",
      done: answer?.finish === "length" ? "The answer reached the most tokens that it may have." : "",
    };
    const text = notes[answer?.state] ?? "";
    if (this.#note.textContent !== text) this.#note.textContent = text;
    this.#note.hidden = !text;
    this.#note.classList.toggle("bad", answer?.state === "failed");
  }

  // Buttons that are there already stay, so that the focus does.
  #showActions(answer) {
    const count = this.#turn.answers.length;
    const isWriting = answer?.state === "writing";
    const shows = `${this.#isLast} ${isWriting} ${count} ${this.#turn.shown} ${answer?.state} ${Boolean(answer?.text)}`;
    if (this.#actions.dataset.of === shows) return;
    this.#actions.dataset.of = shows;
    const had = [this.#actions, this.#asked].map((place) => [...place.querySelectorAll("button")].indexOf(document.activeElement));
    const redo = answer?.state === "failed" || answer?.state === "cut" ? "Try again" : "Regenerate";
    fill(this.#actions, had[0], isWriting ? [] : [
      answer?.text && copyButton("Copy answer", () => shownAnswer(this.#turn).text, () => this.#text.element),
      this.#isLast && answer && button(redo, "redo", () => this.#on.redo(), redo === "Try again" ? { text: redo } : {}),
      count > 1 && this.#versions(count),
    ]);
    fill(this.#asked, had[1], [
      copyButton("Copy question", () => this.#turn.question, () => this.#bubble),
      this.#isLast && !isWriting && button("Edit question", "pencil", () => this.edit()),
    ]);
  }

  #versions(count) {
    const at = this.#turn.shown;
    const step = (label, iconName, to) => button(label, iconName, () => this.#on.show(to), { disabled: to < 0 || to >= count });
    return h("span", { class: "versions", role: "group", "aria-label": "Versions of this answer" },
      step("Previous answer", "back", at - 1),
      h("span", {}, `${at + 1} of ${count}`),
      step("Next answer", "forth", at + 1));
  }

  // Puts a field in the place of the question.
  edit() {
    const field = h("textarea", { "aria-label": "Your question", rows: "1" });
    field.value = this.#turn.question;
    const leave = () => {
      form.replaceWith(this.#bubble);
      this.#asked.hidden = false;
      this.#asked.querySelector("button:last-child")?.focus();
    };
    const send = () => {
      const question = field.value.trim();
      if (!question) return;
      leave();
      this.#on.edit(question);
      this.#bubble.textContent = this.#turn.question;
    };
    const form = h("form", { class: "editing", submit: (event) => { event.preventDefault(); send(); } }, field,
      h("div", { class: "buttons" },
        h("button", { type: "button", class: "plain", click: leave }, "Cancel"),
        h("button", { type: "submit", class: "main" }, "Send")));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); leave(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    });
    this.#bubble.replaceWith(form);
    this.#asked.hidden = true;
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

// Fills `place` with buttons. If number `focused` of those before had the focus, the one in its place gets it.
function fill(place, focused, children) {
  place.replaceChildren(...children.filter(Boolean));
  const usable = [...place.querySelectorAll("button:enabled")];
  if (focused >= 0) (usable[focused] ?? usable.at(-1))?.focus();
}
