// Markdown on the page: elements for the blocks of a text, which stay while the text grows behind them.

import { copyButton, h } from "./dom.js";
import { highlighted } from "./highlight.js";
import { blocksOf } from "./markdown.js";

const TOP = 2; // the level of the heading under which a text stands
const LOWEST = 6;

// Shows a text that grows. `element` is where.
export class MarkdownView {
  #shown = []; // { source, block, level, element } for each block

  constructor() {
    this.element = h("div", { class: "markdown", dir: "auto" });
  }

  update(text) {
    const blocks = blocksOf(text);
    let level = TOP;
    blocks.forEach((block, at) => {
      const old = this.#shown[at];
      if (block.type === "heading") level = Math.min(block.level + TOP, level + 1, LOWEST);
      if (old?.source === block.source && old.level === level) return;
      const element = old && grown(old, block) ? old.element : elementOf(block, level);
      if (!old) this.element.append(element);
      else if (element !== old.element) old.element.replaceWith(element);
      this.#shown[at] = { source: block.source, block, level, element };
    });
    for (const { element } of this.#shown.splice(blocks.length)) element.remove();
  }
}

// Whether the code shown for `old` could be made that of `block` where it is: so nobody loses the place in it.
function grown(old, block) {
  const isSame = old.block.type === "code" && block.type === "code" && old.block.language === block.language;
  if (isSame) old.element.querySelector("code").replaceChildren(...highlighted(block.text, block.language));
  return isSame;
}

function elementOf(block, level) {
  switch (block.type) {
    case "heading": return h(`h${level}`, {}, ...inlineOf(block.inline));
    case "code": return code(block);
    case "math": return scrolling("Formula", h("code", { class: "math" }, block.text));
    case "quote": return h("blockquote", {}, ...block.blocks.map((one) => elementOf(one, level)));
    case "list": return list(block, level);
    case "table": return table(block);
    case "rule": return h("hr");
    default: return h("p", {}, ...inlineOf(block.inline));
  }
}

function code({ language, text }) {
  const inside = h("code", {}, ...highlighted(text, language));
  const copy = copyButton("Copy code", () => inside.textContent, () => inside, { text: "Copy", class: "quiet labelled" });
  return h("div", { class: "code" },
    h("div", { class: "bar" }, h("span", {}, language || "text"), copy),
    scrolling(language ? `Code, ${language}` : "Code", inside));
}

// What may be wider than the page, for the keyboard as well.
function scrolling(label, ...children) {
  return h("pre", { tabindex: "0", role: "group", "aria-label": label }, ...children);
}

function list({ ordered, start, isLoose, items }, level) {
  const shown = items.map(({ checked, blocks }) => {
    const children = blocks.map((block) => {
      const isBare = !isLoose && block.type === "paragraph";
      return isBare ? h("span", {}, ...inlineOf(block.inline)) : elementOf(block, level);
    });
    if (checked === null) return h("li", {}, ...children);
    const box = h("input", { type: "checkbox", disabled: true, checked, "aria-label": checked ? "Done" : "To do" });
    return h("li", { class: "task" }, box, ...children);
  });
  const attributes = { class: isLoose ? "loose" : null, start: ordered && start !== 1 ? start : null };
  return h(ordered ? "ol" : "ul", attributes, ...shown);
}

function table({ align, head, rows }) {
  const cell = (name, more) => (content, column) => h(name, { class: align[column], ...more }, ...inlineOf(content));
  return h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Table" },
    h("table", {},
      h("thead", {}, h("tr", {}, ...head.map(cell("th", { scope: "col" })))),
      h("tbody", {}, ...rows.map((row) => h("tr", {}, ...row.map(cell("td", {})))))));
}

function inlineOf(tree) {
  return tree.map((node) => {
    if (typeof node === "string") return node;
    switch (node.type) {
      case "break": return h("br");
      case "code": return h("code", {}, node.text);
      case "math": return h("code", { class: "math" }, node.text);
      case "link": return h("a", { href: node.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...inlineOf(node.children));
      default: return h(node.type, {}, ...inlineOf(node.children));
    }
  });
}
