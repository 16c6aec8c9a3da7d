// An answer as it is written: from the chunks of a stream to an answer as data.
//
// Knows nothing of how it is shown. `onChange` is called whenever the answer is another.

import { chunksOf } from "./api.js";
import { asRoute } from "./conversation.js";

export class Answering {
  #stop = new AbortController();
  #lostAt = []; // for each change of the route, when it was told, in seconds

  // Fills `answer`, which is new.
  constructor(answer, onChange, now = () => performance.now() / 1000) {
    this.answer = answer;
    this.failure = null;
    this.onChange = onChange;
    this.now = now;
  }

  // What was written by then stays.
  stop() {
    this.#stop.abort();
  }

  // Returns when the answer has ended, however that is. `ask()` gives the request and the key.
  async run(ask) {
    const { answer } = this;
    try {
      const { request, key } = await ask();
      for await (const chunk of chunksOf(request, key, this.#stop.signal)) {
        this.take(chunk);
        this.onChange();
      }
      answer.state = "done";
    } catch (error) {
      if (error.name === "AbortError") {
        answer.state = "stopped";
      } else {
        answer.state = "failed";
        answer.error = error.message;
        this.failure = error;
      }
    }
    this.onChange();
  }

  take(chunk) {
    if (chunk.route) this.#takeRoute(asRoute(chunk.route));
    for (const choice of chunk.choices ?? []) {
      const text = choice.delta?.content ?? "";
      if (text) this.#goesOn();
      this.answer.text += text;
      this.answer.finish = choice.finish_reason ?? this.answer.finish;
    }
  }

  #takeRoute(route) {
    if (!route) return;
    this.answer.route = route;
    while (this.#lostAt.length < route.changes.length) {
      this.#lostAt.push(this.now());
      this.answer.pauses.push(null);
    }
  }

  // Text has come: what was lost before has its place.
  #goesOn() {
    this.answer.route?.changes.forEach((change, at) => {
      if (change.to.length && this.answer.pauses[at] === null) this.answer.pauses[at] = this.now() - this.#lostAt[at];
    });
  }
}
