// Two cards to compare answers, and the list of all of them. Model text is only ever a text node.

import { ALONE, MOVES, capital, make } from "./words.js";

// An answer here: {text, gtalign, tokens, reason, price}.
export function makeCard(article) {
  const title = make("h3", { id: `${article.id}-title` });
  const price = make("p", { class: "price" });
  const move = make("p", { class: "move" });
  const text = make("p", { class: "text" });
  const chain = make("details", { class: "chain" });
  article.replaceChildren(title, price, move, text, chain);
  const head = (name, cost) => {
    title.textContent = name;
    price.textContent = cost === name ? "" : cost;
    move.textContent = "";
    chain.hidden = true;
    chain.open = false;
  };
  const plain = (name, note) => {
    head(name, "");
    article.setAttribute("aria-busy", "false");
    article.classList.add("idle");
    text.textContent = note;
  };
  return {
    plain,
    start(name, cost) {
      head(name, cost);
      article.setAttribute("aria-busy", "true");
      article.classList.remove("idle");
      text.textContent = "";
      move.textContent = "The model thinks…";
    },
    write(shown) {
      if (shown) move.textContent = "The model writes…";
      text.textContent = shown;
    },
    show(answer, name) {
      head(name, answer.price);
      article.setAttribute("aria-busy", "false");
      article.classList.remove("idle");
      text.textContent = answer.text;
      move.textContent = summary(answer);
      showChain(chain, answer.gtalign);
    },
  };
}

// "Asks back · 41 tokens · cut at the limit".
export function summary({ gtalign, tokens, reason }) {
  const parts = [gtalign?.decision ? capital(MOVES[gtalign.decision.action]) : "No readable matrix"];
  if (tokens !== null) parts.push(`${tokens} tokens`);
  if (reason === "length") parts.push("cut at the limit");
  return parts.join(" · ");
}

function showChain(details, gtalign) {
  const unmoved = gtalign?.pricing?.name === ALONE ? "" : gtalign?.reason; // no price, nothing to do
  const blocks = [
    ["Thinking", block(gtalign?.chain, "thinking")],
    ["Analysis", block(gtalign?.chain, "analyze")],
    ["Not steered", unmoved],
  ].filter(([, told]) => told);
  details.hidden = blocks.length === 0;
  details.open = blocks.length > 0;
  details.replaceChildren(make("summary", {}, "Its reasoning"));
  for (const [name, told] of blocks) {
    details.append(make("h4", {}, name), make("p", { class: "text" }, told));
  }
}

// What stands between a block's first tags.
export function block(chain, name) {
  const inside = (chain ?? "").split(`<${name}>`)[1];
  return inside === undefined ? "" : inside.split(`</${name}>`)[0].trim();
}

// history.add(answer) puts a row on top -> how many there are; a row's button calls compare(answer).
export function makeHistory(list, compare) {
  return {
    clear: () => list.replaceChildren(),
    add(answer) {
      const pin = make("button", { type: "button" }, "Compare");
      pin.setAttribute("aria-label", `Compare with: ${answer.price}, ${summary(answer)}`);
      pin.addEventListener("click", () => compare(answer));
      const head = make("div", { class: "line" },
        make("span", { class: "price" }, answer.price),
        make("span", { class: "move" }, summary(answer)), pin);
      list.prepend(make("li", {}, head, make("p", { class: "text" }, answer.text)));
      return list.children.length;
    },
  };
}
