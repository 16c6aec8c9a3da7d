// How peers, blocks, times and what became of a route are put in words. Pure.

const LEAVES = "is about to leave";

// A peer's name, or the end of its id.
export function nameOf(place) {
  return place.name || `…${place.peer.slice(-6)}`;
}

export function blocksOf([start, end]) {
  return end - start === 1 ? `block ${start}` : `blocks ${start}–${end - 1}`;
}

export function number(value) {
  if (value >= 1000) return Math.round(value).toLocaleString("en");
  if (value >= 100) return value.toFixed(0);
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function seconds(value) {
  return value < 10 ? `${value.toFixed(value < 1 ? 2 : 1)} s` : `${Math.round(value)} s`;
}

export function counted(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

// One change of a route in sentences. `pause` is the seconds for which it held the answer up, null where that is
// unknown; an answer that `hasEnded` looks for nobody any more.
export function changeWords(change, pause, hasEnded) {
  const gone = change.from.map(nameOf).join(" and ");
  const blocks = blocksOf(change.blocks);
  const isLeaving = change.reason === LEAVES && change.to.length > 0;
  const lost = change.from.length > 1 ? "were lost: one" : "was lost: it";
  const first = isLeaving ? `${gone} ${LEAVES}.` : `${gone} ${lost} ${change.reason}.`;
  if (change.to.length) {
    const after = pause === null ? "" : `, and the answer went on after ${seconds(pause)}`;
    return `${first} ${capital(blocks)} moved to ${change.to.map(nameOf).join(" and ")}${after}.`;
  }
  return hasEnded ? `${first} Nobody could take over ${blocks}.` : `${first} Looking for another server for ${blocks}…`;
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
