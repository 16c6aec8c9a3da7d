// Elements made from values, never from markup: what a model or a stranger wrote can only become text.

const SVG = "http://www.w3.org/2000/svg";

// Paths of 24 by 24 icons, drawn as lines.
const ICONS = {
  back: "M15 5l-7 7 7 7",
  bin: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  check: "M5 12.5l4.5 4.5L19 7.5",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  down: "M12 5v14M6 13l6 6 6-6",
  forth: "M9 5l7 7-7 7",
  menu: "M4 7h16M4 12h16M4 17h16",
  new: "M12 5v14M5 12h14",
  pencil: "M4 20l1-4L16 5l3 3L8 19z",
  redo: "M19 5v5h-5M19 10a7.5 7.5 0 1 0 .5 5",
  send: "M12 19V5M6 11l6-6 6 6",
  settings: "M4 8h9M17 8h3M4 16h3M11 16h9M15 8m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0M9 16m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0",
  stop: "M8 8h8v8H8z",
};

// An element with attributes and children. Functions listen; true and false set or leave out an attribute.
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

// A button with an icon; its label is shown as well where there is `text`.
export function button(label, iconName, onclick, { text = "", ...more } = {}) {
  const named = text ? {} : { "aria-label": label, title: label };
  return h("button", { type: "button", class: text ? "labelled" : "bare", ...named, click: onclick, ...more }, icon(iconName), text);
}

// Puts `text` into the clipboard; false where the browser does not let it.
export async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

// A button that copies what `text()` gives. Where that is not allowed it selects what `fallback()` gives.
export function copyButton(label, text, fallback, options = {}) {
  const copy = button(label, "copy", async () => {
    const done = await copied(text());
    if (!done) getSelection().selectAllChildren(fallback());
    const shown = copy.firstChild;
    const mark = icon("check");
    shown.replaceWith(mark);
    const words = options.text ? copy.lastChild : null;
    if (words) words.data = done ? "Copied" : "Selected";
    setTimeout(() => {
      mark.replaceWith(icon("copy"));
      if (words) words.data = options.text;
    }, 1600);
  }, options);
  return copy;
}
