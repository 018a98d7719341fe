// Typesets what pymdownx.arithmatex marked, and the text of notebooks.
const marked = [
  { left: "\\(", right: "\\)", display: false },
  { left: "\\[", right: "\\]", display: true },
];
const dollars = [
  { left: "$$", right: "$$", display: true },
  { left: "$", right: "$", display: false },
];

function typeset(selector, delimiters) {
  for (const element of document.querySelectorAll(selector)) {
    renderMathInElement(element, { delimiters });
  }
}

document$.subscribe(() => {
  typeset(".arithmatex", marked);
  typeset(".jp-MarkdownOutput", dollars);
});
