// Keeps the page as fresh as the server's state: news by server-sent events, or by asking where those fail.
// The server renders; this script fetches the page again and moves what differs into place.
"use strict";

const POLL_MS = 10_000;
const LEAST_MS = 1_000;
const REST = 10; // a page that took so long to fetch and show is left alone for ten times as long

const live = document.getElementById("live");
let shown = Number(document.getElementById("page").dataset.version);
let wanted = shown;
let news = null;
let polling = 0;
let timer = 0;
let fetching = false;
let rested = 0;

document.documentElement.classList.add("scripted");

function say(state, text) {
  if (live.dataset.state === state) return;
  live.dataset.state = state;
  live.textContent = text;
}

function isUpToDate(version) {
  return version === shown;
}

function schedule() {
  if (timer || fetching || document.hidden || isUpToDate(wanted)) return;
  timer = setTimeout(refresh, Math.max(0, rested - performance.now()));
}

async function refresh() {
  timer = 0;
  fetching = true;
  const began = performance.now();
  try {
    const answer = await fetch(".", { headers: { accept: "text/html" }, cache: "no-cache" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(new DOMParser().parseFromString(await answer.text(), "text/html"));
    if (news && news.readyState === EventSource.OPEN) say("live", "Live");
    else say("polling", "Asking every 10 seconds");
  } catch {
    say("lost", "Connection lost; trying again");
    wanted = shown;
  } finally {
    fetching = false;
    rested = performance.now() + Math.max(LEAST_MS, REST * (performance.now() - began));
    schedule();
  }
}

function show(next) {
  const page = next.getElementById("page");
  shown = Number(page.dataset.version);
  if (!(wanted >= shown)) wanted = shown;
  document.title = next.title;
  morph(document.getElementById("page"), page);
}

// Makes `old` like `next` while keeping every element that is still there: focus, scrolling and
// opened details stay.
function morph(old, next) {
  for (const { name, value } of next.attributes) {
    if (old.getAttribute(name) !== value && !isReaders(old, name)) old.setAttribute(name, value);
  }
  for (const { name } of [...old.attributes]) {
    if (!next.hasAttribute(name) && !isReaders(old, name)) old.removeAttribute(name);
  }
  let here = old.firstChild;
  for (const there of [...next.childNodes]) {
    const same = counterpart(here, there);
    if (!same) {
      old.insertBefore(there, here);
      continue;
    }
    removeUntil(here, same);
    if (same.nodeType === Node.ELEMENT_NODE) {
      if (!same.isEqualNode(there)) morph(same, there);
    } else if (same.data !== there.data) {
      same.data = there.data;
    }
    here = same.nextSibling;
  }
  removeUntil(here, null);
}

// The first node from `here` on that stands for the same thing as `there`. Text has no name to be found by.
function counterpart(here, there) {
  if (there.nodeType !== Node.ELEMENT_NODE) return here?.nodeType === there.nodeType ? here : null;
  for (let node = here; node; node = node.nextSibling) {
    if (node.nodeName === there.nodeName && node.id === there.id && node.classList[0] === there.classList[0]) return node;
  }
  return null;
}

function removeUntil(node, end) {
  while (node !== end) {
    const gone = node;
    node = node.nextSibling;
    gone.remove();
  }
}

function isReaders(element, attribute) {
  return element.nodeName === "DETAILS" && attribute === "open";
}

function listen() {
  news = new EventSource("api/v1/events");
  news.addEventListener("open", () => {
    clearInterval(polling);
    polling = 0;
    say("live", "Live");
  });
  news.addEventListener("state", (event) => {
    wanted = Number(event.data);
    schedule();
  });
  news.addEventListener("error", () => {
    say("lost", "Connection lost; trying again");
    if (!polling) polling = setInterval(poll, POLL_MS);
    if (news.readyState === EventSource.CLOSED) setTimeout(listen, POLL_MS);
  });
}

function poll() {
  wanted = NaN;
  schedule();
}

document.addEventListener("visibilitychange", schedule);

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  const code = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
});

if (window.EventSource) {
  listen();
} else {
  polling = setInterval(poll, POLL_MS);
}
