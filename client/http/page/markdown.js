// Markdown as blocks of plain values. Follows CommonMark and GitHub's tables where people and models write them.
//
// Blocks are { type, … }: "paragraph" with `inline` (see inline.js), "heading" with `level` and `inline`, "code"
// with `language` and `text`, "math" with `text`, "quote" with `blocks`, "list" with `ordered`, `start`, `isLoose`
// and `items` ({ checked, blocks }), "table" with `align`, `head` and `rows`, and "rule". Raw HTML is text.

import { inline } from "./inline.js";

const DEEPEST = 12; // quotes and lists within each other; what is deeper is text
const MOST_MATH = 60; // lines of a formula
const TAB = "    ";

const FENCE = /^( {0,3})(`{3,}|~{3,}) *([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: +(.*))?$/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const TASK = /^\[([ xX])\] +/;
const DELIMITERS = /^ {0,3}\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const MATH = { "$$": /\$\$ *$/, "\\[": /\\\] *$/ };

// The blocks of `text`, each with the `source` lines that it comes from: the same source is the same block.
export function blocksOf(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n").map((line) => line.replace(/^[ \t]+/, (space) => space.replaceAll("\t", TAB)));
  return read(lines, 0);
}

function read(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, end] = one(lines, at, depth);
    blocks.push(depth ? block : { ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

// The block that begins with line `at`, and the line after it.
function one(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return code(lines, at);
  if (mathOpening(line)) {
    const found = math(lines, at);
    if (found) return found;
  }
  const heading = HEADING.exec(line);
  if (heading) {
    const text = (heading[2] ?? "").replace(/(?:^| )#+ *$/, "").trim();
    return [{ type: "heading", level: heading[1].length, inline: inline(text) }, at + 1];
  }
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && beginsItem(line)) return list(lines, at, depth);
  return table(lines, at) ?? paragraph(lines, at, depth);
}

// To the fence that closes it, or to the end: so it is while it is written.
function code(lines, at) {
  const [, indent, fence, info] = FENCE.exec(lines[at]);
  const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},} *$`);
  const found = lines.findIndex((line, index) => index > at && closing.test(line));
  const end = found < 0 ? lines.length : found;
  const outer = new RegExp(`^ {0,${indent.length}}`);
  const text = lines.slice(at + 1, end).map((line) => line.replace(outer, "")).join("\n");
  return [{ type: "code", language: info.trim().split(/\s/)[0], text }, found < 0 ? end : end + 1];
}

function mathOpening(line) {
  return Object.keys(MATH).find((opening) => line.trimStart().startsWith(opening));
}

function math(lines, at) {
  const opening = mathOpening(lines[at]);
  const first = lines[at].trimStart().slice(opening.length);
  if (MATH[opening].test(first)) return [{ type: "math", text: first.replace(MATH[opening], "").trim() }, at + 1];
  if (first.trim() && first.includes(opening)) return null; // it goes on behind the formula
  const following = lines.slice(at + 1, at + 1 + MOST_MATH);
  const end = following.findIndex((line) => isBlank(line) || MATH[opening].test(line));
  if (end < 0 || isBlank(following[end])) return null;
  const text = [first, ...following.slice(0, end), following[end].replace(MATH[opening], "")].join("\n").trim();
  return [{ type: "math", text }, at + end + 2];
}

function quote(lines, at, depth) {
  const inside = [];
  let end = at;
  for (; end < lines.length; end += 1) {
    const isQuoted = QUOTE.test(lines[end]);
    if (!isQuoted && (isBlank(lines[end]) || isBlank(inside.at(-1) ?? "") || interrupts(lines[end]))) break;
    inside.push(lines[end].replace(QUOTE, ""));
  }
  return [{ type: "quote", blocks: read(inside, depth + 1) }, end];
}

function beginsItem(line) {
  const item = ITEM.exec(line);
  return item !== null && item[1].length < 4 && !RULE.test(line);
}

// Items of the same kind, one after the other. What belongs to an item is indented further than its mark.
function list(lines, at, depth) {
  const [, , mark] = ITEM.exec(lines[at]);
  const kind = mark.at(-1);
  const items = [];
  let isLoose = false;
  let end = at;
  while (end < lines.length && beginsItem(lines[end])) {
    const [, indent, own] = ITEM.exec(lines[end]);
    if (own.at(-1) !== kind) break;
    const [inside, next] = itemLines(lines, end, indent.length);
    const task = TASK.exec(inside[0]);
    if (task) inside[0] = inside[0].slice(task[0].length);
    const blocks = read(inside, depth + 1);
    items.push({ checked: task ? task[1] !== " " : null, blocks });
    const gap = saidFrom(lines, next);
    const goesOn = gap < lines.length && beginsItem(lines[gap]) && ITEM.exec(lines[gap])[2].at(-1) === kind;
    isLoose ||= (goesOn && gap > next) || hasGap(inside);
    end = goesOn ? gap : next;
  }
  const ordered = mark.length > 1;
  return [{ type: "list", ordered, start: ordered ? Number(mark.slice(0, -1)) : 1, isLoose, items }, end];
}

// The lines of the item that begins with line `at`, without its mark, and the line after them.
function itemLines(lines, at, indent) {
  const [, , mark, space, first] = ITEM.exec(lines[at]);
  const width = indent + mark.length + (space.length > 4 ? 1 : Math.max(space.length, 1));
  const least = indent + 2; // people indent by two even below "1."
  const inside = [(space.length > 4 ? space.slice(1) : "") + first];
  let end = at + 1;
  let next = 0; // the first line from `end` on that says something, once that was looked for
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const deep = indentOf(line);
    if (isBlank(line)) {
      if (next < end) next = saidFrom(lines, end);
      if (next === lines.length || indentOf(lines[next]) < least) break;
      inside.push("");
    } else if (deep >= least) {
      inside.push(line.slice(Math.min(deep, width)));
    } else if (isBlank(inside.at(-1)) || interrupts(line) || ITEM.test(line)) {
      break;
    } else {
      inside.push(line);
    }
  }
  return [inside, end];
}

// Whether an empty line lies between parts of an item, but not within code.
function hasGap(lines) {
  let inCode = false;
  return lines.some((line, at) => {
    if (FENCE.test(line)) inCode = !inCode;
    return !inCode && isBlank(line) && at < lines.length - 1 && !ITEM.test(lines[at + 1]);
  });
}

function table(lines, at) {
  if (!lines[at].includes("|") || !DELIMITERS.test(lines[at + 1] ?? "")) return null;
  const head = cells(lines[at]);
  const marks = cells(lines[at + 1]);
  if (head.length !== marks.length) return null;
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && lines[end].includes("|")) end += 1;
  const align = marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "end") : "start"));
  const rows = lines.slice(at + 2, end).map((line) => {
    const row = cells(line);
    return head.map((_, column) => inline(row[column] ?? ""));
  });
  return [{ type: "table", align, head: head.map(inline), rows }, end];
}

// The cells of a table's line. A bar that is escaped or in code does not part them.
function cells(line) {
  const found = [""];
  let inCode = false;
  const inside = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  for (let at = 0; at < inside.length; at += 1) {
    const char = inside[at];
    if (char === "\\" && inside[at + 1] === "|") {
      found[found.length - 1] += "|";
      at += 1;
    } else if (char === "|" && !inCode) {
      found.push("");
    } else {
      if (char === "`") inCode = !inCode;
      found[found.length - 1] += char;
    }
  }
  return found.map((cell) => cell.trim());
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines[end]) && !table(lines, end)) end += 1;
  const text = lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd();
  return [{ type: "paragraph", inline: inline(text) }, end];
}

// Whether a line begins a block even right behind a paragraph.
function interrupts(line) {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = beginsItem(line) && ITEM.exec(line);
  return Boolean(item) && item[4] !== "" && (item[2].length === 1 || Number.parseInt(item[2], 10) === 1);
}

function isBlank(line) {
  return line.trim() === "";
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

// The first line from `at` on that says something.
function saidFrom(lines, at) {
  while (at < lines.length && isBlank(lines[at])) at += 1;
  return at;
}
