// The route of an answer on the page: who computed which blocks, and where the time of a step went.

import { h } from "./dom.js";
import { counted, nameOf, number, seconds } from "./words.js";

const COLOURS = 6;
const MOST_NAMES = 3; // of servers in the summary
const PARTS = ["compute", "queue", "network"];

// Shows the route of one answer, as far as it is known. `element` is where.
export class RouteView {
  #summary = h("summary");
  #card = h("div", { class: "card" });
  #shown = null;

  constructor() {
    this.element = h("details", { class: "route", hidden: true }, this.#summary, this.#card);
  }

  update(answer) {
    const { route } = answer;
    if (route === this.#shown) return;
    this.#shown = route;
    this.element.hidden = !route;
    if (!route) return;
    const timed = route.hops.filter((hop) => hop.steps > 0);
    const lost = lostOf(route);
    const blocks = route.hops.map((hop, at) => ({ size: hop.blocks[1] - hop.blocks[0], kind: lost(hop) ? "lost" : "compute", at }));
    this.#summary.replaceChildren(h("span", { class: "cut" }, summaryOf(route)));
    this.#card.replaceChildren(
      strip("Blocks", blocks),
      ...(timed.length ? [strip(`A step takes ${number(sum(timed, total))} ms`, route.hops.flatMap(partsOf)), legend()] : []),
      tableOf(route, lost),
      factsOf(route));
  }
}

function summaryOf(route) {
  const servers = route.hops.length > MOST_NAMES ? counted(route.hops.length, "server") : route.hops.map(nameOf).join(" → ");
  const speed = route.tokens_per_s > 0 ? `${number(route.tokens_per_s)} tokens/s` : "";
  const moved = route.changes.filter((change) => change.to.length).length;
  return [servers, speed, moved ? counted(moved, "recovery", "recoveries") : ""].filter(Boolean).join(" · ");
}

// Whether a hop is lost, and nobody has taken its place.
function lostOf(route) {
  const last = route.changes.at(-1);
  const gone = last && last.to.length === 0 ? last.from : [];
  return (hop) => gone.some(({ peer, blocks }) => peer === hop.peer && blocks[0] === hop.blocks[0]);
}

// A bar of parts, each as wide as its share. The table says the same.
function strip(label, parts) {
  const shown = parts.filter(({ size }) => size > 0).map(({ size, kind, at }) => {
    const part = h("span", { class: `${kind} hop-${at % COLOURS}` });
    part.style.flexGrow = size;
    return part;
  });
  return h("div", { class: "strip" }, h("p", {}, label), h("div", { class: "parts", "aria-hidden": "true" }, ...shown));
}

function legend() {
  return h("p", { class: "legend", "aria-hidden": "true" }, ...PARTS.map((part) => h("span", {}, h("span", { class: `key ${part}` }), part)));
}

function partsOf(hop, at) {
  const { compute_ms: compute, queue_ms: queue, rtt_ms: network } = hop;
  return hop.steps ? Object.entries({ compute, queue, network }).map(([kind, size]) => ({ size, kind, at })) : [];
}

function total(hop) {
  return hop.compute_ms + hop.queue_ms + hop.rtt_ms;
}

function sum(hops, value) {
  return hops.reduce((so, hop) => so + value(hop), 0);
}

function tableOf(route, lost) {
  const parts = PARTS.map((part) => h("th", { scope: "col", class: "n" }, part[0].toUpperCase() + part.slice(1)));
  return h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Servers of this answer" },
    h("table", {},
      h("caption", {}, "Milliseconds a step, on average"),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Server"), h("th", { scope: "col", class: "n" }, "Blocks"), ...parts)),
      h("tbody", {}, ...route.hops.map((hop, at) => rowOf(hop, at, lost(hop))))));
}

function rowOf(hop, at, isLost) {
  const times = [hop.compute_ms, hop.queue_ms, hop.rtt_ms];
  return h("tr", {},
    h("th", { scope: "row" }, h("span", { class: "who" },
      h("span", { class: `swatch hop-${at % COLOURS}` }),
      h("bdi", { class: "cut", title: hop.peer }, nameOf(hop)))),
    h("td", { class: "n" }, `${hop.blocks[0]}–${hop.blocks[1] - 1}`),
    ...(isLost
      ? [h("td", { class: "n gone", colspan: times.length }, "lost")]
      : times.map((time) => h("td", { class: "n" }, hop.steps ? number(time) : "–"))));
}

function factsOf(route) {
  const { drafted, accepted } = route.speculation;
  const facts = [
    ["Speed", route.tokens_per_s > 0 && `${number(route.tokens_per_s)} tokens/s`],
    ["First token", route.ttft_ms > 0 && `after ${seconds(route.ttft_ms / 1000)}`],
    ["Answer", route.completion_tokens > 0 && counted(route.completion_tokens, "token")],
    ["Prompt", `${counted(route.prompt_tokens, "token")}${route.cached_tokens ? `, ${route.cached_tokens.toLocaleString("en")} cached` : ""}`],
    ["Speculation", drafted > 0 && `${accepted} of ${drafted} drafts right`],
    ["Computed again", route.replayed_tokens > 0 && counted(route.replayed_tokens, "token")],
  ];
  return h("dl", {}, ...facts.filter(([, said]) => said).map(([name, said]) => h("div", {}, h("dt", {}, name), h("dd", {}, said))));
}
