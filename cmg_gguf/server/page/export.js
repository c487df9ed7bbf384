// A comparison as one HTML file that needs nothing else. What was said gets into it as text alone.
const CSS = "body{max-width:60rem;margin:2rem auto;padding:0 1rem;font:16px/1.55 system-ui,sans-serif;color-scheme:light dark}img{max-width:100%}.both{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr))}p,pre{white-space:pre-wrap;overflow-wrap:anywhere}.doubt{text-decoration:underline dotted 2px}";
const POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";

// pictures: data URLs. map: the same of a heat map, with its title; or null.
export function exported({ pictures, question, plain, guided, note, map, request }) {
  const page = document.implementation.createHTMLDocument("cmg-gguf: plain and guided");
  const add = (parent, name, text = "", attributes = {}) => {
    const element = page.createElement(name);
    element.textContent = text;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  };
  page.documentElement.lang = "en";
  add(page.head, "meta", "", { "http-equiv": "Content-Security-Policy", content: POLICY });
  add(page.head, "style", CSS);
  add(page.body, "h1", "Plain and guided");
  for (const src of pictures) add(page.body, "img", "", { src, alt: "A picture that was asked about" });
  add(page.body, "p", question);
  const both = add(page.body, "div", "", { class: "both" });
  for (const [title, answer] of [["Plain", plain], ["Guided", guided]]) {
    const section = add(both, "section");
    add(section, "h2", title);
    said(add(section, "p"), answer, add);
  }
  add(page.body, "p", note);
  if (map) {
    add(page.body, "h2", map.title);
    add(page.body, "img", "", { src: map.url, alt: map.label });
    add(page.body, "p", map.scale);
  }
  add(page.body, "h2", "The request");
  add(page.body, "pre", request);
  const meta = page.createElement("meta");
  meta.setAttribute("charset", "utf-8");
  page.head.prepend(meta);
  return `<!doctype html>\n${new XMLSerializer().serializeToString(page.documentElement)}`;
}

function said(paragraph, answer, add) {
  for (const node of answer.childNodes) {
    if (node.nodeType === Node.TEXT_NODE) {
      paragraph.append(node.textContent);
      continue;
    }
    const attributes = node.dataset.tip ? { title: node.dataset.tip } : {};
    if (node.classList.contains("doubt")) attributes.class = "doubt";
    add(paragraph, node.localName === "mark" ? "mark" : "span", node.textContent, attributes);
  }
}
