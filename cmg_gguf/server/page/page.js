// The page: a picture, a question, and both answers side by side.
import { Answer } from "./answer.js";
import { ask } from "./chat.js";
import { curl, python } from "./code.js";

const at = (id) => document.getElementById(id);
let url = null;
let running = null;

function take(file) {
  if (!file?.type.startsWith("image/")) return tell("This is no picture.");
  const reader = new FileReader();
  reader.onload = () => {
    url = reader.result;
    at("picture").src = url;
    at("picture").hidden = false;
    at("name").textContent = file.name;
    tell("");
  };
  reader.onerror = () => tell("The picture cannot be read.");
  reader.readAsDataURL(file);
}

function tell(text) { at("status").textContent = text; }

function body(cmg) {
  const text = { type: "text", text: at("question").value };
  const image = url ? [{ type: "image_url", image_url: { url } }] : [];
  return {
    messages: [{ role: "user", content: [...image, text] }],
    max_tokens: Number(at("tokens").value), temperature: 0, logprobs: true, top_logprobs: 3,
    ...(cmg === undefined ? {} : { cmg }),
  };
}

function guidance() {
  if (!at("own").checked) return undefined;
  return { alpha: Number(at("alpha").value), beta: Number(at("beta").value) };
}

// As the server was started: what the next question would change.
function setSliders(cmg) {
  for (const id of ["alpha", "beta"]) {
    at(id).value = cmg[id];
    at(`${id}-out`).textContent = at(id).value;
  }
}

async function both() {
  running = new AbortController();
  at("ask").disabled = true;
  at("stop").disabled = false;
  const request = body(guidance());
  at("curl").textContent = curl(request);
  at("python").textContent = python(request);
  const plain = new Answer(at("plain"));
  const guided = new Answer(at("guided"));
  const { signal } = running;
  const key = at("key").value;
  at("note").textContent = "";
  tell("Asking.");
  try {
    await Promise.all([
      ask(body("off"), key, signal, (chunk) => plain.said(chunk)),
      ask(request, key, signal, (chunk) => guided.said(chunk)),
    ]);
    const { n_changed: n } = guided.cmg;
    at("note").textContent = `${n} ${n === 1 ? "token" : "tokens"} changed; alpha ${guided.cmg.alpha}, beta ${guided.cmg.beta}`;
    if (!at("own").checked) setSliders(guided.cmg);
    tell("Both answers are complete.");
  } catch (error) {
    tell(signal.aborted ? "Stopped." : error.message);
    if (error.status === 401) {
      at("key-row").hidden = false;
      at("key").focus();
    }
    running.abort();
  }
  at("ask").disabled = false;
  at("stop").disabled = true;
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); both(); });
at("stop").addEventListener("click", () => running.abort());
at("file").addEventListener("change", (event) => take(event.target.files[0]));
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) take(event.clipboardData.files[0]); });
document.addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
document.addEventListener("dragleave", () => at("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
for (const id of ["alpha", "beta"]) {
  const show = () => { at(`${id}-out`).textContent = at(id).value; };
  at(id).addEventListener("input", () => { at("own").checked = true; show(); });
  show();
}
for (const id of ["curl", "python"]) {
  at(`copy-${id}`).addEventListener("click", () => navigator.clipboard.writeText(at(id).textContent)
    .then(() => tell("Copied."), () => tell("The browser does not let this page copy: select the text.")));
}
