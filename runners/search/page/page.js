// Asks the service and shows hits. What was asked stands behind the # of the address, so that back and forward work.
"use strict";

const byId = (id) => document.getElementById(id);
const [form, text, find, file, hits, status, error] = ["ask", "text", "find", "file", "hits", "status", "error"].map(byId);
let bits = 1; // of a code
let latest = 0; // number of the question that was asked last; answers to earlier ones are dropped
let picture = null; // the last one that was dropped, chosen or pasted

async function ask(title, request, shown) {
  const number = ++latest;
  document.body.classList.add("busy");
  byId("hint").hidden = true;
  error.hidden = true;
  try {
    const response = await fetch(...request);
    const answer = await response.json();
    if (number !== latest) return;
    if (!response.ok) throw new Error(answer.error);
    show(title, answer.hits, shown);
  } catch (problem) {
    if (number !== latest) return;
    const unreachable = problem instanceof TypeError || problem instanceof SyntaxError;
    error.textContent = unreachable ? "The service does not answer. Is it still running?" : problem.message;
    error.hidden = false;
    hits.replaceChildren();
    byId("question").hidden = true;
  } finally {
    if (number === latest) document.body.classList.remove("busy");
  }
}

function show(title, found, shown) {
  const asked = byId("asked");
  asked.hidden = !shown;
  if (shown) asked.src = shown; else asked.removeAttribute("src");
  status.textContent = found.length ? title : `${title}: nothing found`;
  byId("question").hidden = false;
  hits.replaceChildren(...found.map(card));
  window.scrollTo(0, 0);
}

function card(hit) {
  const item = byId("card").content.cloneNode(true);
  const [button, shown] = [item.querySelector("button"), item.querySelector(".shown")];
  if (hit.kind === "image" && hit.thumbnail) {
    const image = new Image();
    image.loading = "lazy";
    image.alt = "";
    image.src = hit.thumbnail;
    image.addEventListener("error", () => shown.replaceChildren("picture is gone"));
    shown.append(image);
    item.querySelector(".caption").textContent = hit.caption;
  } else {
    const words = document.createElement("span");
    words.textContent = hit.caption;
    shown.classList.add("words");
    shown.append(words);
  }
  const meter = item.querySelector("meter");
  meter.max = bits;
  meter.value = bits - hit.distance;
  meter.title = `${hit.distance} of ${bits} bits differ`;
  item.querySelector(".bits").textContent = `${hit.distance} bit${hit.distance === 1 ? "" : "s"}`;
  button.title = hit.metadata.path || hit.caption;
  button.setAttribute("aria-label", `${hit.kind === "image" ? "picture" : "text"} ${hit.caption}, ${hit.distance} of ${bits} bits apart: find more like it`);
  button.addEventListener("click", () => go({ item: hit.id, title: hit.caption, shown: hit.kind === "image" ? hit.thumbnail : null }));
  return item;
}

const json = (body) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

function askPicture(chosen) {
  picture = chosen;
  const form = new FormData();
  form.append("file", chosen);
  if (byId("asked").src.startsWith("blob:")) URL.revokeObjectURL(byId("asked").src);
  const query = find.value ? `?find=${find.value}` : "";
  ask(`Like ${chosen.name || "the picture"}`, [`/api/search/picture${query}`, { method: "POST", body: form }], URL.createObjectURL(chosen));
}

// The question in the address: #text=..., #item=..., with #find=... beside it
function go(question) {
  const address = new URLSearchParams(question.item === undefined ? { text: question.text } : { item: question.item });
  if (find.value) address.set("find", find.value);
  const hash = `#${address}`;
  if (hash === location.hash) return follow();
  history.pushState({ title: question.title, shown: question.shown }, "", hash);
  follow();
}

function follow() {
  const question = new URLSearchParams(location.hash.slice(1));
  const said = question.get("find") || "";
  find.value = said;
  const state = history.state || {};
  if (question.has("text")) {
    picture = null;
    text.value = question.get("text");
    const body = { text: text.value, find: said || null };
    ask(`“${text.value}”`, ["/api/search", json(body)], null);
  } else if (question.has("item")) {
    picture = null;
    const number = encodeURIComponent(question.get("item"));
    const query = said ? `?find=${said}` : "";
    ask(`More like ${state.title ? `“${state.title}”` : `item ${number}`}`, [`/api/items/${number}/similar${query}`], state.shown || null);
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (text.value.trim()) go({ text: text.value.trim() });
});
find.addEventListener("change", () => {
  if (picture) return askPicture(picture);
  const question = new URLSearchParams(location.hash.slice(1));
  const state = history.state || {};
  if (question.has("text")) go({ text: question.get("text") });
  else if (question.has("item")) go({ item: question.get("item"), title: state.title, shown: state.shown });
});
byId("choose").addEventListener("click", () => file.click());
file.addEventListener("change", () => {
  if (file.files.length) askPicture(file.files[0]);
  file.value = "";
});
window.addEventListener("popstate", follow);

const first = (list) => [...list].find((entry) => entry.type.startsWith("image/"));
window.addEventListener("paste", (event) => {
  const pasted = first(event.clipboardData.files);
  if (pasted) askPicture(pasted);
});
let inside = 0; // dragenter and dragleave come for every element on the way
const dragging = (event) => event.dataTransfer.types.includes("Files");
window.addEventListener("dragenter", (event) => { if (dragging(event)) { inside++; byId("drop").hidden = false; } });
window.addEventListener("dragleave", (event) => { if (dragging(event) && --inside <= 0) { inside = 0; byId("drop").hidden = true; } });
window.addEventListener("dragover", (event) => event.preventDefault());
window.addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  byId("drop").hidden = true;
  const dropped = event.dataTransfer.files;
  if (dropped.length) askPicture(first(dropped) || dropped[0]);
});
window.addEventListener("keydown", (event) => {
  const cards = [...hits.querySelectorAll(".card")];
  const place = cards.indexOf(document.activeElement);
  const columns = getComputedStyle(hits).gridTemplateColumns.split(" ").length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (event.key === "/" && !["INPUT", "SELECT"].includes(document.activeElement.tagName)) {
    event.preventDefault();
    text.focus();
    text.select();
  } else if (place >= 0 && step && cards[place + step]) {
    event.preventDefault();
    cards[place + step].focus();
  } else if (event.key === "ArrowDown" && document.activeElement === text && cards.length) {
    event.preventDefault();
    cards[0].focus();
  }
});

async function begin() {
  try {
    const health = await (await fetch("/api/health")).json();
    bits = health.bits;
    const count = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
    byId("about").textContent = `${count(health.images, "picture")}, ${count(health.texts, "text")} · ${health.model}`;
  } catch {
    byId("about").textContent = "";
  }
  follow();
}
begin();
