// Colours for code, by what most languages have in common: comments, strings, numbers and reserved words.

import { h } from "./dom.js";

const LONGEST = 50_000; // characters; longer code stays plain

const HASH = ["bash", "sh", "shell", "zsh", "console", "python", "py", "ruby", "rb", "perl", "r", "yaml", "yml", "toml", "ini", "dockerfile", "make", "makefile", "nix", "elixir", "julia", "powershell", "ps1"];
const DASHES = ["sql", "lua", "haskell", "hs", "ada", "elm"];
const MARKUP = ["html", "xml", "svg", "vue"];
const PLAIN = ["", "text", "txt", "plaintext", "markdown", "md", "diff", "output", "log", "csv"];

const STRINGS = String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|` + "`(?:\\\\.|[^`\\\\])*`?";
const NUMBERS = String.raw`\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;
const WORDS = new Set(`abstract and as assert async await begin bool boolean break case catch char class const continue
  def default defer del delete do double elif else elsif end enum except export extends extern false finally float fn for
  foreach from func function global go goto if impl implements import in int interface is lambda let long loop match mod
  module move mut namespace new nil none None not null nullptr of or package pass private protected public raise return
  self short signed sizeof static str string struct super switch template then this throw throws trait True False true
  try type typedef typeof undefined union unless unsafe unsigned until use using val var virtual void volatile when where
  while with yield
  SELECT FROM WHERE INSERT INTO UPDATE SET DELETE CREATE TABLE JOIN LEFT RIGHT INNER OUTER ON GROUP BY ORDER LIMIT AS AND
  OR NOT NULL VALUES DISTINCT HAVING UNION ALL CASE WHEN THEN ELSE END`.split(/\s+/));

// Nodes for `text`, of which the coloured parts are elements.
export function highlighted(text, language) {
  const name = language.toLowerCase();
  if (PLAIN.includes(name) || text.length > LONGEST) return [text];
  const pattern = new RegExp(`(${commentsOf(name)})|(${STRINGS})|(${NUMBERS})|([A-Za-z_]\\w*)`, "g");
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(pattern)) {
    const kind = kindOf(match);
    if (!kind) continue;
    nodes.push(text.slice(at, match.index), h("span", { class: kind }, match[0]));
    at = match.index + match[0].length;
  }
  return [...nodes, text.slice(at)];
}

function commentsOf(name) {
  if (HASH.includes(name)) return String.raw`(?<![\w$&])#[^\n]*`;
  if (DASHES.includes(name)) return String.raw`--[^\n]*`;
  if (MARKUP.includes(name)) return String.raw`<!--[\s\S]*?(?:-->|$)`;
  return String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`;
}

function kindOf([, comment, string, number, word]) {
  if (comment) return "comment";
  if (string) return "string";
  if (number) return "number";
  return WORDS.has(word) ? "word" : null;
}
