// Which move is chosen along the whole range of one price, the others held: found by halving.

import { MOVES, capital, make } from "./words.js";

const FIRST = 9; // equally spaced looks before halving

// Segments [{action, from, to}] over steps 0…last. `look(step)` -> action, one call at a time;
// an action that lives between two equal looks is missed: a picture, no proof.
export async function findSegments(last, look) {
  const known = new Map();
  const at = async (step) => {
    if (!known.has(step)) known.set(step, await look(step));
    return known.get(step);
  };
  const edges = [];
  const halve = async (low, high) => {
    if ((await at(low)) === (await at(high))) return;
    if (high - low === 1) edges.push(high);
    else {
      const middle = (low + high) >> 1;
      await halve(low, middle);
      await halve(middle, high);
    }
  };
  const stops = Array.from({ length: FIRST }, (_, i) => Math.round((i * last) / (FIRST - 1)));
  for (let i = 1; i < stops.length; i += 1) await halve(stops[i - 1], stops[i]);
  const starts = [0, ...edges];
  return starts.map((from, i) => ({ action: known.get(from), from, to: (starts[i + 1] ?? last + 1) - 1 }));
}

// Draws them; `priceAt(step)` -> "$12". Returns the sentence that says the same.
export function drawStrip(bar, segments, last, priceAt) {
  const parts = segments.map(({ action, from, to }) => {
    const part = make("span", { class: `part ${action}` }, make("span", { class: "part-name" }, capital(MOVES[action])));
    part.style.setProperty("--share", ((to - from + 1) / (last + 1)).toFixed(4));
    return part;
  });
  bar.replaceChildren(make("span", { class: "here" }), ...parts);
  const [first, ...others] = segments;
  if (!others.length) return `The model ${MOVES[first.action]} everywhere.`;
  const later = others.map(({ action, from }) => `from ${priceAt(from)} it ${MOVES[action]}`);
  return `At ${priceAt(0)} the model ${MOVES[first.action]}; ${later.join(", ")}.`;
}

export function drawHere(bar, share) {
  bar.querySelector(".here")?.style.setProperty("--at", share.toFixed(4));
}
