// The page: a picture, a question, and both answers side by side.
import { Answer } from "./answer.js";
import { ask } from "./chat.js";
import { Heat, SCALES, draw, drawScale } from "./heat.js";
import { exported } from "./export.js";
import { curl, python } from "./code.js";

const at = (id) => document.getElementById(id);
let urls = []; // of the pictures, as data
let running = null;
let shown = null; // the word whose heat is shown

async function take(files) {
  const chosen = [...files];
  if (!chosen.length || chosen.some((file) => !file.type.startsWith("image/"))) return tell("This is no picture.");
  try {
    show(await Promise.all(chosen.map(read)), chosen.map((file) => file.name).join(", "));
    tell("");
  } catch {
    tell("The picture cannot be read.");
  }
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(file);
  });
}

function show(given, name) {
  urls = given;
  at("picture").hidden = !urls.length;
  if (urls.length) at("picture").src = urls[0];
  at("more").replaceChildren(...urls.slice(1).map((url, i) => {
    const image = new Image();
    image.src = url;
    image.alt = `Picture ${i + 2}`;
    return image;
  }));
  at("name").textContent = name;
}

// Scenes that the built-in model knows; other models have none.
async function offerScenes() {
  const kinds = await (await fetch("/page/scenes")).json();
  at("kind").replaceChildren(...kinds.map((kind) => new Option(kind, kind)));
  at("scenes").hidden = kinds.length === 0;
}

async function takeScene() {
  const kind = at("kind").value;
  const index = Math.floor(1000 * Math.random());
  const response = await fetch(`/page/scene?kind=${encodeURIComponent(kind)}&index=${index}`);
  if (!response.ok) return tell(`The scene cannot be drawn: the server answered ${response.status}.`);
  at("file").value = "";
  await take([new File([await response.blob()], `${kind} scene ${index}`, { type: "image/png" })]);
}

function tell(text) { at("status").textContent = text; }

function body(cmg) {
  const text = { type: "text", text: at("question").value };
  const images = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  return {
    messages: [{ role: "user", content: [...images, text] }],
    max_tokens: Number(at("tokens").value), temperature: 0, logprobs: true, top_logprobs: 3,
    ...(cmg === undefined ? {} : { cmg }),
  };
}

function guidance() {
  const own = at("own").checked;
  const settings = { ...(own ? strengths() : {}), ...rules(), ...asked() };
  return Object.keys(settings).length ? settings : undefined;
}

// Beside the answer; there is nothing to look at without a picture.
function asked() {
  return urls.length && at("looks").checked ? { evidence: true, heat: true } : undefined;
}

// What is filled in of the rest.
function rules() {
  const given = (id) => at(id).value !== "";
  const found = {};
  if (given("start") || given("stop-layer")) {
    const range = { start: given("start") ? Number(at("start").value) : 0, stop: given("stop-layer") ? Number(at("stop-layer").value) : 1 };
    found.layers = { rule: "layer_range", ...range };
  }
  if (given("gate")) found.gate = { rule: "disagreement", factor: Number(at("gate").value) };
  if (given("scope")) found.scope = at("scope").value;
  return found;
}

function strengths() {
  return { alpha: Number(at("alpha").value), beta: Number(at("beta").value) };
}

// As the server was started: what the next question would change.
function setSliders(cmg) {
  for (const id of ["alpha", "beta"]) {
    at(id).value = cmg[id];
    at(`${id}-out`).textContent = at(id).value;
  }
}

// The heat of a word, opened.
function look(title, answer, word, tokens) {
  answer.heat ??= new Heat(answer.cmg.heat);
  const { layers, masked, images } = answer.heat;
  const unknown = images.find((image) => !image.boxes)?.unknown;
  if (unknown) return tell(`Where the words look is not known: ${unknown}`);
  const same = shown?.answer === answer;
  shown = { title, answer, word, tokens };
  if (!same) {
    const names = [["mean", "mean of all"], ...(masked.length ? [["masked", "mean of those that guidance masks"]] : []), ...layers.map((l) => [l, `layer ${l}`])];
    at("which").replaceChildren(...images.map((_, k) => new Option(k + 1, k)));
    at("which-row").hidden = images.length === 1;
    at("layer").replaceChildren(...names.map(([value, text]) => new Option(text, value)));
  }
  at("heat").hidden = false;
  drawHeat();
  at("heat").scrollIntoView({ block: "nearest" });
}

function drawHeat() {
  const { title, answer, word, tokens } = shown;
  const k = Number(at("which").value);
  const { size: [width, height] } = answer.heat.images[k];
  const scale = at("scale").value;
  const layer = at("layer").value;
  const map = at("map");
  const ratio = 512 / Math.max(width, height);
  [map.width, map.height] = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
  const values = answer.heat.map(tokens, layer, scale, map.width, map.height, k);
  draw(map, answer.pictures[k], values, scale);
  drawScale(at("bar"));
  at("heat-h").textContent = `${title}: where “${word}” looks`;
  at("ticks").replaceChildren(...SCALES[scale].ticks.map((tick) => {
    const label = document.createElement("span");
    label.textContent = `${tick}x`;
    return label;
  }));
  at("meaning").textContent = `${SCALES[scale].meaning}. A map shows what is read, not why a word is said.`;
  const best = values.reduce((most, value, i) => (value > values[most] ? i : most), 0);
  const percent = (part, whole) => Math.round((100 * part) / whole);
  map.setAttribute("aria-label", `Heat of “${word}”: strongest, ${values[best].toFixed(1)}x, ${percent(best % map.width, map.width)} % from the left and ${percent(Math.floor(best / map.width), map.height)} % from the top`);
}

let compared = null; // what the answers on the page are to

// The comparison as a file, with the map that is open.
function save() {
  const map = at("heat").hidden ? null : {
    title: at("heat-h").textContent, url: at("map").toDataURL(), label: at("map").getAttribute("aria-label"),
    scale: at("meaning").textContent,
  };
  const text = exported({ ...compared, plain: at("plain"), guided: at("guided"), note: at("note").textContent, map });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/html" }));
  link.download = "comparison.html";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const MOST_KEPT = 20;

// What is on the page now goes into the history, from where it comes back with its words and maps.
function keep() {
  const kept = ["plain", "guided", "note"].map((id) => [at(id), [...at(id).childNodes]]);
  const entry = { ...compared };
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = entry.question;
  button.addEventListener("click", () => {
    if (!at("stop").disabled) return tell("An answer is under way: stop it first.");
    for (const [element, nodes] of kept) element.replaceChildren(...nodes);
    compared = entry;
    at("curl").textContent = entry.request;
    at("python").textContent = entry.python;
    at("question").value = entry.question;
    show(entry.pictures, entry.name);
    at("heat").hidden = true;
    at("export").disabled = false;
    tell("From the history.");
  });
  const item = document.createElement("li");
  item.append(button);
  at("history").prepend(item);
  if (at("history").children.length > MOST_KEPT) at("history").lastChild.remove();
  at("past").hidden = false;
}

async function both() {
  running = new AbortController();
  at("ask").disabled = true;
  at("stop").disabled = false;
  const request = body(guidance());
  at("curl").textContent = curl(request);
  at("python").textContent = python(request);
  const plain = new Answer(at("plain"), (...word) => look("Plain", plain, ...word));
  const guided = new Answer(at("guided"), (...word) => look("Guided", guided, ...word));
  plain.pictures = guided.pictures = [at("picture"), ...at("more").children].map((image) => image.cloneNode());
  const { signal } = running;
  const key = at("key").value;
  at("note").textContent = "";
  at("export").disabled = true;
  compared = { pictures: urls, question: at("question").value, request: at("curl").textContent, python: at("python").textContent, name: at("name").textContent };
  at("heat").hidden = true;
  tell("Asking.");
  try {
    await Promise.all([
      ask(body(asked() ? { alpha: 0, beta: 0, ...asked() } : "off"), key, signal, (chunk) => plain.said(chunk)),
      ask(request, key, signal, (chunk) => guided.said(chunk)),
    ]);
    const { n_changed: n } = guided.cmg;
    at("note").textContent = `${n} ${n === 1 ? "token" : "tokens"} changed; alpha ${guided.cmg.alpha}, beta ${guided.cmg.beta}`;
    if (!at("own").checked) setSliders(guided.cmg);
    at("export").disabled = false;
    keep();
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

for (const id of ["which", "layer", "scale"]) at(id).addEventListener("change", drawHeat);
at("export").addEventListener("click", save);
at("form").addEventListener("submit", (event) => { event.preventDefault(); both(); });
at("stop").addEventListener("click", () => running.abort());
offerScenes().catch(() => {});
at("scene").addEventListener("click", () => takeScene().catch(() => tell("The server does not answer.")));
at("file").addEventListener("change", (event) => take(event.target.files));
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) take(event.clipboardData.files); });
document.addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
document.addEventListener("dragleave", () => at("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take(event.dataTransfer.files);
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
