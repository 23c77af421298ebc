// The shown attribution as a file.
// The JSON is read back by `Attribution.from_response`, the HTML holds no script and
// refers to nothing outside itself.

import { el, save } from "./dom.js";

const POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'";

export function saveJson({ report, turn, whole }) {
  const shown = whole.targets ? whole : report.data;
  const data = { ...shown, text: turn.content, tokens: report.pieces };
  save(`${data.id}.json`, "application/json", `${JSON.stringify(data, null, 2)}\n`);
}

export async function saveHtml({ report, turn }, shown) {
  const sheets = ["heat.css", "app.css"].map((name) => fetch(new URL(name, import.meta.url)));
  const styles = await Promise.all(sheets.map(async (sheet) => (await sheet).text()));
  const answer = turn.answer.cloneNode(true);
  for (const element of [answer, ...answer.querySelectorAll(".claim")]) {
    for (const name of ["tabindex", "role", "aria-label", "aria-pressed", "aria-describedby"]) element.removeAttribute(name);
  }
  const main = el("main", { class: "alone" }, el("p", { class: "eyebrow" }, `FlashTrace attribution · ${report.data.id}`));
  main.append(...[...shown.childNodes].map((node) => node.cloneNode(true)));
  const card = el("section", { class: "card" }, el("h2", {}, "Answer"), answer);
  if (turn.citations) card.append(el("h2", { class: "above" }, "Sources"), turn.citations.list.cloneNode(true));
  main.append(card);
  for (const mark of main.querySelectorAll("mark")) mark.setAttribute("tabindex", "0");
  const head = [
    el("meta", { charset: "utf-8" }),
    el("meta", { "http-equiv": "Content-Security-Policy", content: POLICY }),
    el("meta", { name: "viewport", content: "width=device-width, initial-scale=1" }),
    el("meta", { name: "color-scheme", content: "light dark" }),
    el("title", {}, `Attribution of “${report.data.target.text}”`),
  ];
  const lines = head.map((element) => element.outerHTML);
  const text = [
    '<!DOCTYPE html>\n<html lang="en">\n<head>',
    ...lines,
    // Our own style sheets, the one part that is not written by the browser's serialiser.
    `<style>${styles.join("\n")}</style>\n</head>\n<body class="flashtrace">`,
    main.outerHTML,
    "</body>\n</html>\n",
  ].join("\n");
  save(`${report.data.id}.html`, "text/html", text);
}
