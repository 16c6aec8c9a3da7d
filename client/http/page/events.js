// Server-sent events out of the bytes of a response.

// Takes text as it comes, in any pieces, and gives the data of each event that is complete.
export class EventReader {
  #rest = "";
  #data = [];

  push(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return events;
  }
}

// The data of the events in a response's body. Throws where the connection breaks.
export async function* eventsOf(body) {
  const reader = new EventReader();
  const bytes = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await bytes.read();
      if (done) return;
      yield* reader.push(value);
    }
  } finally {
    await bytes.cancel().catch(() => {});
  }
}
