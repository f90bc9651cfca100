"use strict";
const list = document.getElementById("list");
const field = document.getElementById("search");
const order = document.getElementById("order");
const told = document.getElementById("told");
const items = [...list.children];
const bodies = {}; // the HTML below each latent's line that was not on the page at first
const coming = {}; // the files that have been asked for

// Each file of passages calls this.
function passages(found) {
  Object.assign(bodies, found);
  items.filter(item => item.open).forEach(fill);
  if (field.value) search();
}

function fill(item) {
  const html = bodies[item.dataset.latent];
  if (html && item.childElementCount === 1) item.insertAdjacentHTML("beforeend", html);
}

function load(file) {
  if (!file || coming[file]) return;
  coming[file] = document.head.appendChild(document.createElement("script"));
  coming[file].src = file;
}

function opened(item) {
  load(item.dataset.file);
  fill(item);
}

function text(item) {
  const more = (bodies[item.dataset.latent] || "").replace(/<[^>]*>/g, "");
  return (item.textContent + " " + more).toLowerCase();
}

function search() {
  const wanted = field.value.trim().toLowerCase();
  if (wanted) items.forEach(item => load(item.dataset.file));
  for (const item of items) item.hidden = Boolean(wanted) && !text(item).includes(wanted);
  const shown = items.filter(item => !item.hidden).length;
  told.value = wanted ? `${shown} of ${items.length} latents` : `${items.length} latents`;
}

function sort() {
  const [name, way] = order.value.split(" ");
  const by = item => Number(item.dataset[name]) * (way === "down" ? -1 : 1);
  list.append(...[...items].sort((a, b) => by(a) - by(b)));
}

function follow() {
  const item = document.getElementById(location.hash.slice(1));
  if (items.includes(item)) {
    item.open = true;
    item.scrollIntoView();
  }
}

items.forEach(item => item.addEventListener("toggle", () => item.open && opened(item)));
field.addEventListener("input", search);
order.addEventListener("change", sort);
addEventListener("hashchange", follow);
document.getElementById("controls").hidden = false;
search();
follow();
