"use strict";
// Tells what lies under the pointer. All else is in the page already; names are only ever set as text.
const facts = JSON.parse(document.getElementById("facts").textContent);
const tip = document.getElementById("tip");

function size(bytes, digits = 3) {
  let value = bytes, unit = 0;
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${Number.isInteger(value) ? value : Number(value.toPrecision(digits))} ${units[unit]}`;
}

function unpack(runs, count) {
  const bins = new Float64Array(count);
  for (const [first, length, bytes] of runs) bins.fill(bytes, first, first + length);
  return bins;
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function swatch(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("viewBox", "0 0 12 12");
  rect.setAttribute("width", "12"); rect.setAttribute("height", "12"); rect.setAttribute("rx", "3");
  rect.setAttribute("class", name);
  svg.append(rect);
  return svg;
}

for (const strip of document.querySelectorAll(".strip")) {
  const picture = facts.strips[strip.dataset.strip];
  const rows = picture.rows.map((row) => ({ ...row, bins: unpack(row.runs, facts.count) }));
  const cursor = element("div", "", "cursor");
  let at = 0;
  cursor.hidden = true;
  strip.append(cursor);

  const show = (index, x, y) => {
    at = Math.max(0, Math.min(facts.count - 1, index));
    const box = strip.getBoundingClientRect();
    const start = at * facts.width, end = Math.min(start + facts.width, picture.size);
    cursor.hidden = false;
    cursor.style.left = `${((at + 0.5) / facts.count) * box.width}px`;
    tip.replaceChildren(element("div", start < picture.size ? `${size(start, 5)} to ${size(end, 5)}` : "beyond its end", "where"));
    if (start < picture.size) tip.append(element("div", `from byte ${start}`, "where"));
    if (start < picture.size && !rows.some((row) => row.bins[at])) tip.append(element("div", "only holes", "row"));
    for (const row of rows) {
      if (!row.bins[at]) continue;
      const line = element("div", "", "row");
      const share = (100 * row.bins[at]) / (end - start);
      line.append(swatch(row.class), element("span", row.name),
                  element("span", `${size(row.bins[at])}, ${share < 1 ? "<1" : Math.round(share)}%`));
      tip.append(line);
    }
    tip.hidden = false;
    const wide = tip.offsetWidth, high = tip.offsetHeight;
    const left = (x ?? box.left + ((at + 0.5) / facts.count) * box.width) + 14;
    const below = (y ?? box.bottom) + 14;
    tip.style.left = `${Math.max(4, left + wide > innerWidth - 4 ? left - wide - 28 : left)}px`;
    tip.style.top = `${below + high > innerHeight - 4 ? Math.max(4, (y ?? box.top) - high - 14) : below}px`;
  };
  const hide = () => { tip.hidden = true; cursor.hidden = true; };
  const move = (event) => {
    const box = strip.getBoundingClientRect();
    show(Math.floor(((event.clientX - box.left) / box.width) * facts.count), event.clientX, event.clientY);
  };
  strip.addEventListener("pointermove", move);
  strip.addEventListener("pointerdown", move);
  strip.addEventListener("pointerleave", hide);
  strip.addEventListener("blur", hide);
  strip.addEventListener("focus", () => { if (strip.matches(":focus-visible")) show(at); });
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -32, PageDown: 32, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(at + step);
  });
}
