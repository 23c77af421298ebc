// Arrow keys inside the heat-map and the tabs, each one stop of the Tab key.
// Exactly the element that has the focus can be reached with the Tab key.

import { $ } from "./dom.js";

export function moveMark(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || event.target.tagName !== "MARK") return;
  const marks = [...$("report").querySelectorAll("mark")];
  const next = marks[marks.indexOf(event.target) + step];
  if (!next) return;
  event.preventDefault();
  event.target.setAttribute("tabindex", "-1");
  next.setAttribute("tabindex", "0");
  next.focus();
}

export function moveTab(event) {
  const tabs = [...$("tabs").children];
  const at = tabs.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  tabs[(to + tabs.length) % tabs.length].click();
}
