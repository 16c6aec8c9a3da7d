// The turns of the conversation that is shown, and keeping the newest of them in sight.

import { TurnView } from "./turn.js";

const NEAR = 60; // pixels from the end within which one counts as being there
const BESIDE = matchMedia("(min-width: 76rem)"); // as in page.css: routes stand beside their answers

// Shows turns in `element`. `on` says what is done: `edit(question)`, `redo()` and `show(turn, version)`.
export class Thread {
  #element;
  #toEnd;
  #on;
  #views = new Map(); // by turn
  #follows = true;

  // `toEnd` is a button that is there while the newest is out of sight.
  constructor(element, toEnd, on) {
    this.#element = element;
    this.#toEnd = toEnd;
    this.#on = on;
    addEventListener("scroll", () => this.#look(), { passive: true });
    toEnd.addEventListener("click", () => {
      this.end();
      this.#look();
    });
  }

  // Shows `turns` and no others any more.
  update(turns) {
    for (const [turn, view] of this.#views) {
      if (turns.includes(turn)) continue;
      view.element.remove();
      this.#views.delete(turn);
    }
    turns.forEach((turn, at) => {
      const isLast = at === turns.length - 1;
      this.#view(turn).update({ isLast, opensRoute: isLast && BESIDE.matches });
    });
    if (this.#follows) this.#scroll();
    this.#look();
  }

  // Lets the question of the last turn be edited.
  edit() {
    [...this.#views.values()].at(-1)?.edit();
  }

  // Goes to the newest, and stays with it while it grows.
  end() {
    this.#follows = true;
    this.#scroll();
  }

  #view(turn) {
    if (!this.#views.has(turn)) {
      const { edit, redo, show } = this.#on;
      const view = new TurnView(turn, { edit, redo, show: (version) => show(turn, version) });
      this.#views.set(turn, view);
      this.#element.append(view.element);
    }
    return this.#views.get(turn);
  }

  #scroll() {
    scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
  }

  #look() {
    this.#follows = innerHeight + scrollY >= document.documentElement.scrollHeight - NEAR;
    this.#toEnd.hidden = this.#follows;
  }
}
