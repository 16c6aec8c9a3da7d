// Markdown within a line or paragraph, as a tree of plain values. Follows CommonMark where people write it.
//
// A tree is a list of strings and of { type, … }: "strong", "em" and "del" with `children`, "code" and "math"
// with `text`, "link" with `href` and `children`, "break". Raw HTML is text, and so is every link that does not
// lead to a web or mail address. Takes time in proportion to the text, whatever that is.

const ESCAPABLE = /[!-/:-@[-`{-~]/;
const SPACE = /\s/u;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const SPECIAL = /[\\`*_~[\]!<&\n$]|(?<![\p{L}\p{N}_])(?:https?:\/\/|www\.)/gu;
const ENTITY = /&(?:(amp|lt|gt|quot|apos|nbsp)|#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6}));/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BREAK_TAG = /<br ?\/?>/iy;
const BARE = /(?:https?:\/\/|www\.)[^\s<>"`]{1,2000}/y;
const TARGET = /\(\s*(?:<([^<>\n]{0,2000})>|([^\s()]{0,2000}(?:\([^\s()]{0,500}\)[^\s()]{0,500}){0,8}))(?:\s+(?:"[^"]{0,500}"|'[^']{0,500}'))?\s*\)/y;
const MATH = [/\\\((.{1,500}?)\\\)/sy, /\$\$(.{1,500}?)\$\$/sy, /\\\[(.{1,500}?)\\\]/sy];
const LONGEST_MARK = 16; // a longer run of asterisks is no emphasis
const MOST_OPEN = 24; // marks that wait for their end at a time

// The tree of `text`.
export function inline(text) {
  return new Reader(text).read();
}

// What a tree says, without its form.
export function plain(tree) {
  return tree.map((node) => (typeof node === "string" ? node : node.type === "break" ? "\n" : node.text ?? plain(node.children))).join("");
}

// The address that a link may lead to, null where it may lead nowhere.
export function safeHref(target) {
  try {
    const url = new URL(target);
    return ["https:", "http:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

// Reads a text once from left to right into a flat list of pieces: strings, nodes, and marks that may turn out to
// open or close something.
class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.pieces = [];
    this.brackets = []; // the places in `pieces` of brackets that may begin a link
    this.noCode = new Set(); // runs of backticks of these lengths close nowhere from here on
  }

  read() {
    while (this.at < this.text.length) {
      SPECIAL.lastIndex = this.at;
      const special = SPECIAL.exec(this.text);
      const end = special ? special.index : this.text.length;
      this.say(this.text.slice(this.at, end));
      this.at = end;
      if (special) this.special(special[0]);
    }
    return joined(emphasised(this.pieces));
  }

  special(char) {
    const isRead =
      (char === "\\" && (this.math() || this.escape())) ||
      (char === "$" && this.math()) ||
      (char === "`" && this.code()) ||
      ("*_~".includes(char) && this.mark(char)) ||
      (char === "[" && this.open("[")) ||
      (char === "!" && this.text[this.at + 1] === "[" && this.open("![")) ||
      (char === "]" && this.close()) ||
      (char === "<" && this.angled()) ||
      (char === "&" && this.entity()) ||
      (char === "\n" && this.lineBreak()) ||
      (char.length > 1 && this.bare());
    if (!isRead) {
      this.say(char);
      this.at += char.length;
    }
  }

  say(text) {
    if (text) this.pieces.push(text);
    return true;
  }

  // What matches here, which has been read then.
  take(pattern) {
    pattern.lastIndex = this.at;
    const match = pattern.exec(this.text);
    if (match) this.at = pattern.lastIndex;
    return match;
  }

  escape() {
    const next = this.text[this.at + 1];
    if (next === "\n") {
      this.at += 1;
      return this.lineBreak();
    }
    if (next === undefined || !ESCAPABLE.test(next)) return false;
    this.at += 2;
    return this.say(next);
  }

  math() {
    const match = this.take(MATH[0]) ?? this.take(MATH[1]) ?? this.take(MATH[2]);
    if (match) this.pieces.push({ type: "math", text: match[1].trim() });
    return Boolean(match);
  }

  code() {
    const run = /`+/y;
    run.lastIndex = this.at;
    const ticks = run.exec(this.text)[0];
    const begin = this.at + ticks.length;
    this.at = begin;
    const end = this.noCode.has(ticks.length) ? -1 : this.closing(ticks.length, begin);
    if (end < 0) {
      this.noCode.add(ticks.length);
      return this.say(ticks);
    }
    const inside = this.text.slice(begin, end).replaceAll("\n", " ");
    const isPadded = /^ .*[^ ].* $|^ [^ ] $/.test(inside);
    this.pieces.push({ type: "code", text: isPadded ? inside.slice(1, -1) : inside });
    this.at = end + ticks.length;
    return true;
  }

  // Where a run of exactly so many backticks begins, -1 where there is none.
  closing(length, from) {
    const run = /`+/g;
    run.lastIndex = from;
    for (let match; (match = run.exec(this.text)); ) {
      if (match[0].length === length) return match.index;
    }
    return -1;
  }

  mark(char) {
    let end = this.at;
    while (this.text[end] === char) end += 1;
    const [before, after] = [this.text[this.at - 1] ?? " ", this.text[end] ?? " "];
    const count = end - this.at;
    this.at = end;
    if (count > LONGEST_MARK || (char === "~" && count !== 2)) return this.say(char.repeat(count));
    const opens = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
    const closes = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
    const isWord = char === "_"; // does not count within words
    this.pieces.push({
      mark: char,
      count,
      whole: count,
      opens: opens && (!isWord || !closes || PUNCTUATION.test(before)),
      closes: closes && (!isWord || !opens || PUNCTUATION.test(after)),
    });
    return true;
  }

  open(bracket) {
    this.brackets.push(this.pieces.length);
    this.pieces.push(bracket);
    this.at += bracket.length;
    return true;
  }

  // A bracket that closes makes a link of what is in it, if an address follows. An image is a link to it.
  close() {
    const opened = this.brackets.pop();
    if (opened === undefined) return false;
    this.at += 1;
    const from = this.at;
    const target = this.text[from] === "(" && this.take(TARGET);
    const href = target && safeHref(target[1] ?? target[2]);
    if (!href) {
      this.at = from;
      return this.say("]");
    }
    const inside = joined(emphasised(this.pieces.slice(opened + 1)));
    const isImage = this.pieces[opened] === "![";
    const children = isImage ? [plain(inside)] : inside;
    this.pieces.length = opened;
    this.pieces.push({ type: "link", href, children: plain(inside) ? children : [href] });
    if (!isImage) this.brackets = []; // there are no links in links
    return true;
  }

  angled() {
    const match = this.take(ANGLED);
    if (match) return this.link(match[1], match[1].replace(/^mailto:/, ""));
    if (!this.take(BREAK_TAG)) return false;
    this.pieces.push({ type: "break" });
    return true;
  }

  entity() {
    const match = this.take(ENTITY);
    if (!match) return false;
    const code = match[2] ? Number(match[2]) : parseInt(match[3], 16);
    const isCode = code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code <= 0xdfff);
    return this.say(match[1] ? ENTITIES[match[1]] : isCode ? String.fromCodePoint(code) : "\ufffd");
  }

  // Lines of an answer are meant as such.
  lineBreak() {
    const last = this.pieces.length - 1;
    if (typeof this.pieces[last] === "string") this.pieces[last] = this.pieces[last].replace(/ +$/, "");
    while (this.text[this.at + 1] === " ") this.at += 1;
    this.at += 1;
    this.pieces.push({ type: "break" });
    return true;
  }

  bare() {
    const from = this.at;
    const match = this.take(BARE);
    if (!match) return false;
    const address = withoutEnd(match[0]);
    this.at = from + address.length;
    return this.link(address.startsWith("www.") ? `https://${address}` : address, address);
  }

  link(target, text) {
    const href = safeHref(target);
    this.pieces.push(href === null ? text : { type: "link", href, children: [text] });
    return true;
  }
}

// An address in a text, without the punctuation that ends a sentence, or a bracket that was open before.
function withoutEnd(address) {
  let end = address.length;
  let surplus = 0;
  for (const char of address) surplus += (char === ")") - (char === "(");
  for (;;) {
    const last = address[end - 1];
    if (last === ")" && surplus > 0) surplus -= 1;
    else if (!/[.,;:!?'*_~\]]/.test(last)) break;
    end -= 1;
    if (end === 0) break;
  }
  return address.slice(0, end);
}

// Pairs marks that open with marks that close (CommonMark's "process emphasis").
function emphasised(pieces) {
  const frames = [{ mark: null, nodes: [] }]; // what is open, from the outside in
  for (const piece of pieces) {
    const top = () => frames[frames.length - 1];
    if (!piece.mark) {
      top().nodes.push(piece);
      continue;
    }
    let left = piece.count;
    while (piece.closes && left > 0) {
      const at = opener(frames, piece);
      if (at < 0) break;
      while (frames.length - 1 > at) abandon(frames);
      const frame = frames.pop();
      const used = piece.mark === "~" || (frame.left >= 2 && left >= 2) ? 2 : 1;
      const type = piece.mark === "~" ? "del" : used === 2 ? "strong" : "em";
      const node = { type, children: joined(frame.nodes) };
      left -= used;
      if (frame.left > used) frames.push({ ...frame, left: frame.left - used, nodes: [node] });
      else top().nodes.push(node);
    }
    if (left > 0 && piece.opens && frames.length < MOST_OPEN) frames.push({ mark: piece.mark, left, piece, nodes: [] });
    else if (left > 0) top().nodes.push(piece.mark.repeat(left));
  }
  while (frames.length > 1) abandon(frames);
  return frames[0].nodes;
}

// The innermost frame that a mark closes, -1 where there is none.
function opener(frames, closing) {
  for (let at = frames.length - 1; at > 0; at -= 1) {
    const { mark, piece } = frames[at];
    if (mark !== closing.mark) continue;
    // a run that both opens and closes pairs only with one whose length fits (CommonMark's rule of three)
    const isMixed = (piece.closes || closing.opens) && mark !== "~";
    const isOdd = isMixed && (piece.whole + closing.whole) % 3 === 0 && (piece.whole % 3 || closing.whole % 3);
    if (!isOdd) return at;
  }
  return -1;
}

// Nothing closed the innermost frame: its mark is text.
function abandon(frames) {
  const { mark, left, nodes } = frames.pop();
  frames[frames.length - 1].nodes.push(mark.repeat(left), ...nodes);
}

// The same nodes, with neighbouring strings made one.
function joined(nodes) {
  const found = [];
  for (const node of nodes) {
    if (node.mark) found.push(node.mark.repeat(node.count));
    else found.push(node);
  }
  const merged = [];
  for (const node of found) {
    const last = merged.length - 1;
    if (typeof node === "string" && typeof merged[last] === "string") merged[last] += node;
    else if (node !== "") merged.push(node);
  }
  return merged;
}
