// Scores as colours, and tokens laid over the messages they were rendered from.
// A token's level depends on its score and the strongest score of the same view alone;
// with the square-root scale it is the level of the HTML reports (vllm_flashtrace/api/heat.py).

export const LEVELS = 8;
const DECADES = 3;

/** Full heat: the highest score on the client's own text, so that a template token that soaks up
 * attention does not wash out the rest; the highest of all if no token is located. */
export function heatScale(scores, located) {
  let own = 0;
  let all = 0;
  scores.forEach((score, index) => {
    all = Math.max(all, score);
    if (located.has(index)) own = Math.max(own, score);
  });
  return located.size ? own : all;
}

/** 0 (no colour) to LEVELS. */
export function heatLevel(score, scale, mode) {
  if (!(scale > 0) || !(score > 0)) return 0;
  const ratio = Math.min(1, score / scale);
  const height =
    mode === "linear" ? ratio : mode === "log" ? 1 + Math.log10(ratio) / DECADES : Math.sqrt(ratio);
  return Math.max(0, Math.floor(LEVELS * height));
}

/** The lowest score that counts at a slider position of 0 to 100. */
export function thresholdScore(position, scale) {
  return scale * (position / 100) ** 2;
}

/** Pieces of one message: text with the tokens it came from (none where the template changed it).
 * Token offsets count code points, as Python does. */
export function layOver(text, tokens) {
  const points = Array.from(text);
  const parts = [];
  let at = 0;
  for (const { index, start, end } of tokens) {
    const last = parts.at(-1);
    if (start < at && last?.indices.length) {
      // Tokens that share a character are drawn as one.
      last.indices.push(index);
      last.text += points.slice(at, end).join("");
    } else {
      if (start > at) parts.push({ text: points.slice(at, start).join(""), indices: [] });
      parts.push({ text: points.slice(start, end).join(""), indices: [index] });
    }
    at = Math.max(at, end);
  }
  if (at < points.length) parts.push({ text: points.slice(at).join(""), indices: [] });
  return parts;
}

/** A token with its blanks made visible, for tables. */
export function visible(token) {
  const shown = token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
  return shown !== shown.trim() || !shown ? shown.replaceAll(" ", "␣") : shown;
}

export function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

export function number(score) {
  return score >= 0.001 || score === 0 ? score.toFixed(4) : score.toExponential(1);
}
