// Elements made of text alone.
// Nothing here or elsewhere on the page parses text as HTML (the page's Content Security
// Policy refuses it too).

export const $ = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text nodes. */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) {
      element.setAttribute(key, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** How many code points a text has: the server counts these, as Python does. */
export const points = (text) => Array.from(text).length;

/** The place of a code point in a text, in UTF-16 units. */
export const units = (text, point) => Array.from(text).slice(0, point).join("").length;

/** The part of an element's text that is selected, as [start, end) in UTF-16 units, or null. */
export function selectedRange(element) {
  const selection = document.getSelection();
  if (!selection.rangeCount || selection.isCollapsed) return null;
  const range = selection.getRangeAt(0);
  if (!range.intersectsNode(element)) return null;
  const inside = document.createRange();
  inside.selectNodeContents(element);
  const length = inside.toString().length;
  const from = inside.comparePoint(range.startContainer, range.startOffset);
  const to = inside.comparePoint(range.endContainer, range.endOffset);
  if (from > 0 || to < 0) return null;
  const start = from < 0 ? 0 : lengthBefore(element, range.startContainer, range.startOffset);
  const end = to > 0 ? length : lengthBefore(element, range.endContainer, range.endOffset);
  return start < end ? [start, end] : null;
}

function lengthBefore(element, container, offset) {
  const before = document.createRange();
  before.setStart(element, 0);
  before.setEnd(container, offset);
  return before.toString().length;
}

/** Offers a file made here for download. */
export function save(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
