// A payoff matrix as a table that is also a heat map; drawn once, then only its numbers change.

import { KEYS, MOVES, QUESTIONS, about, capital, make, payoff } from "./words.js";

// makeMatrix(table, caption) -> show(matrix, {pareto, chosen, money, range}); the cell with
// the sum (model + user) farthest from zero, or at least at `range`, has the strongest colour.
export function makeMatrix(table, caption) {
  const cells = new Map(KEYS.map((key) => [key, makeCell()]));
  const head = make("tr", {}, make("th", { scope: "col" }, "You ask"));
  for (const [action, move] of Object.entries(MOVES)) {
    head.append(make("th", { scope: "col" }, capital(move), " ", make("abbr", {}, action)));
  }
  const body = make("tbody");
  for (const [asked, name] of Object.entries(QUESTIONS)) {
    const title = make("th", { scope: "row" }, capital(name), " ", make("abbr", {}, asked));
    const row = Object.keys(MOVES).map((action) => cells.get(`${asked}_${action}`).td);
    body.append(make("tr", {}, title, ...row));
  }
  const paid = makeMoney();
  table.replaceChildren(
    make("caption", {}, caption), make("thead", {}, head), body, make("tfoot", {}, paid.row),
  );
  return (matrix, { pareto, chosen, money, range = 1 }) => {
    const sums = Object.values(matrix).map((cell) => Math.abs(cell.LLM + cell.user));
    const most = Math.max(range, ...sums);
    for (const [key, cell] of cells) {
      cell.show(matrix[key], pareto.includes(key), key === chosen, most);
    }
    paid.show(money);
    return most;
  };
}

function makeCell() {
  const [model, user] = [make("b"), make("b")];
  const marks = make("span", { class: "marks" });
  const td = make("td", {}, line("model", model), line("you", user), marks);
  const show = (cell, isPareto, isChosen, range) => {
    model.textContent = payoff(cell.LLM);
    user.textContent = payoff(cell.user);
    const sum = cell.LLM + cell.user;
    td.classList.toggle("loss", sum < 0);
    td.classList.toggle("chosen", isChosen);
    td.style.setProperty("--heat", Math.min(1, Math.abs(sum) / range).toFixed(3));
    const found = [isChosen ? "✓ chosen" : "", isPareto ? "◆ Pareto" : ""].filter(Boolean);
    marks.replaceChildren(...found.map((text) => make("span", {}, text)));
  };
  return { td, show };
}

function line(who, number) {
  return make("span", { class: "side" }, make("span", { class: "who" }, `${who} `), number, " ");
}

// What a turn costs (−) or brings (+) each side in dollars, below the actions.
function makeMoney() {
  const sides = Object.keys(MOVES).map((action) => [action, make("b"), make("b")]);
  const tds = sides.map(([, model, user]) => make("td", {}, line("model", model), line("you", user)));
  const row = make("tr", {}, make("th", { scope: "row" }, "Money in a turn"), ...tds);
  const show = (money) => {
    row.hidden = !money;
    if (!money) return;
    for (const [action, model, user] of sides) {
      model.textContent = about(money[action].LLM);
      user.textContent = about(money[action].user);
    }
  };
  return { row, show };
}
