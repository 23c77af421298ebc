// What the user selects: at once after the mouse, by a button after a finger or a pen.
// A selection counts only if it was begun in an answer.

import { $ } from "./dom.js";

/** Calls `explain(turn, chosen)`; `turns()` are the answers on the page. */
export function watchSelections(turns, explain) {
  let began = null; // The turn in which the pointer went down.
  let pending = null;

  const turnAt = (node) => turns().find((turn) => turn.element.contains(node)) ?? null;

  document.addEventListener("pointerdown", (event) => {
    if (event.target !== $("explain")) began = turnAt(event.target);
  });
  document.addEventListener("pointerup", (event) => {
    const turn = began;
    if (!turn || event.pointerType !== "mouse" || event.button !== 0) return;
    // A click into a selection clears it after this event.
    setTimeout(() => {
      const chosen = turn.selection();
      if (chosen) explain(turn, chosen);
    });
  });
  document.addEventListener("selectionchange", () => {
    const turn = turnAt(document.getSelection().anchorNode);
    const chosen = turn?.selection();
    pending = chosen ? { turn, chosen } : null;
    $("explain").hidden = !pending || !matchMedia("(pointer: coarse)").matches;
  });
  // Without this the tap would clear the selection first.
  $("explain").addEventListener("pointerdown", (event) => event.preventDefault());
  $("explain").addEventListener("click", () => {
    $("explain").hidden = true;
    if (pending) explain(pending.turn, pending.chosen);
  });
}
