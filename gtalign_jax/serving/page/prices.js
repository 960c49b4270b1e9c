// The controls: policy, prices, sensitivity, expected use, rule, mode. What they say is one object.

import { Refused } from "./api.js";
import {
  MODES, MOVES, PARAMETERS, POLICIES, ROWS, RULES, capital, dollars, make, number, spaced,
} from "./words.js";

export const LAST = 240; // a slider's steps: zero, then logarithmic (signed: zero in the middle)
const SCALES = {
  tokens: { least: 0.01, most: 10000 },
  request: { least: 0.0001, most: 10 },
  points: { least: 1, most: 100000 },
};
const DRAGGED = "per_token"; // a policy that has something to drag
const SIDES = ["the model", "you"];

const byId = (id) => document.getElementById(id);

export function fromStep(step, { least, most, signed }) {
  const zero = signed ? LAST / 2 : 0;
  const away = Math.abs(step - zero);
  if (away === 0) return 0;
  const size = least * (most / least) ** ((away - 1) / (LAST - zero - 1));
  return Math.sign(step - zero) * Number(size.toPrecision(3));
}

export function toStep(value, { least, most, signed }) {
  const zero = signed ? LAST / 2 : 0;
  const size = Math.min(Math.abs(value), most);
  if (size < least) return zero;
  const share = Math.log(size / least) / Math.log(most / least);
  return zero + Math.sign(value) * Math.round(1 + (LAST - zero - 1) * share);
}

// One price: a slider and a number field that say the same. `changed(price)` after each input.
function makePrice(id, { label, money, unit, scale, cost = false, first = false }, value, changed) {
  const range = make("input", { type: "range", id, min: 0, max: LAST, step: 1 });
  const field = make("input", { type: "number", step: "any", id: `${id}-exact`, inputmode: "decimal" });
  if (!scale.signed) field.min = 0;
  const named = money ? [label, make("span", { class: "label-unit" }, `, ${money}`)] : [label];
  const name = make("label", { for: id }, ...named);
  field.setAttribute("aria-label", `${name.textContent}, exact`);
  const write = money ? dollars : number;
  const price = { label, scale, range, value, cost, first, write };
  const say = () => range.setAttribute("aria-valuetext", `${number(price.value)} ${unit}`);
  range.value = toStep(value, scale);
  field.value = value;
  say();
  range.addEventListener("input", () => {
    price.value = fromStep(Number(range.value), scale);
    field.value = price.value;
    field.setAttribute("aria-invalid", "false");
    say();
    changed(price);
  });
  field.addEventListener("input", () => {
    field.setAttribute("aria-invalid", String(!field.validity.valid || field.value === ""));
    if (field.value === "" || !field.validity.valid) return;
    price.value = Number(field.value);
    range.value = toStep(price.value, scale);
    say();
    changed(price);
  });
  const pair = make("div", { class: "slide" }, range, field);
  price.element = make("div", { class: "field" }, name, pair);
  return price;
}

// `told`: name -> what the server says of it, for names that have no words here.
function fillSelect(select, told, words, changed) {
  const explain = byId(`${select.id}-help`);
  for (const name of Object.keys(told)) {
    select.append(make("option", { value: name }, words[name]?.[0] ?? capital(spaced(name))));
  }
  const show = () => { explain.textContent = words[select.value]?.[1] ?? capital(told[select.value]); };
  select.addEventListener("change", () => { show(); changed(); });
  return show;
}

// The server's own prices, "per_token(output=100)" -> ["per_token", {output: 100}], where it has any
// and the controls can show them: a sum is more than they can.
function usualPrices({ steered_by_default: steered, pricing, policies }) {
  const said = steered ? /^(\w+)(?:\(([^()]*)\))?$/.exec(pricing) : null;
  if (said === null || said[1] === "none" || !(said[1] in policies)) return [DRAGGED, {}];
  const pairs = (said[2] ?? "").split(", ").filter(Boolean).map((pair) => pair.split("="));
  return [said[1], Object.fromEntries(pairs.map(([name, value]) => [name, Number(value)]))];
}

// The panel filled from what the server knows about the game; `changed()` after each input.
export function makePrices({ policies, ...game }, changed) {
  const [first, usualValues] = usualPrices({ policies, ...game });
  const made = new Map(); // policy -> its prices, kept while another policy is shown
  let active = null;
  const touched = (price) => { active = price; changed(); };
  const current = () => {
    const policy = byId("policy").value;
    if (!made.has(policy)) {
      const values = policy === first ? usualValues : {};
      made.set(policy, makePolicy(policy, policies[policy].parameters, values, touched));
    }
    return made.get(policy);
  };
  const showPolicy = () => {
    const prices = [...current().values()];
    layOut(byId("sliders"), prices);
    active = prices.find((price) => price.first) ?? prices[0] ?? null;
  };
  const helps = Object.fromEntries(Object.entries(policies).map(([name, { help }]) => [name, help]));
  const show = [
    fillSelect(byId("policy"), helps, POLICIES, () => { showPolicy(); changed(); }),
    fillSelect(byId("rule"), game.rules, RULES, changed),
    fillSelect(byId("mode"), game.modes, MODES, changed),
    fillSelect(byId("rows"), game.rows, ROWS, changed),
  ];
  if (first in policies) byId("policy").value = first;
  byId("rule").value = game.rule;
  byId("mode").value = game.mode;
  for (const each of show) each();
  showPolicy();
  const sensitivity = makeSensitivity(game.sensitivity, touched);
  const usage = makeUsage(game.usage, changed);
  const usual = game.sensitivity;
  const say = () => ({
    pricing: { policy: byId("policy").value, ...valuesOf(current()) },
    rule: byId("rule").value, rows: byId("rows").value,
    sensitivity: sensitivity.map((price) => price.value), usage: usage(),
  });
  return {
    say, mode: () => byId("mode").value, seed: () => Number(byId("seed").value),
    active: () => active,
    // In a few words: the prices, and whatever else is not as usual (but for the expected use).
    describe({ pricing, rule = game.rule, mode = game.mode, rows, sensitivity = usual }) {
      const unusual = [];
      if (String(sensitivity) !== String(usual)) {
        const [toModel, toYou] = sensitivity.map(number);
        unusual.push(`a dollar counts ${toModel} to the model, ${toYou} to you`);
      }
      if (rows && rows !== Object.keys(game.rows)[0]) unusual.push(ROWS[rows]?.[0] ?? spaced(rows));
      if (rule !== game.rule) unusual.push(RULES[rule]?.[0] ?? spaced(rule));
      if (mode !== game.mode) unusual.push(MODES[mode]?.[0] ?? spaced(mode));
      return [describe(pricing), ...unusual].join(" · ");
    },
    // What the controls would say with the active price at another step of its slider.
    sayAt(step) {
      const kept = active.value;
      active.value = fromStep(step, active.scale);
      const said = say();
      active.value = kept;
      return said;
    },
  };
}

// The provider's own costs are folded away, unless there is nothing else to set.
function layOut(place, prices) {
  const [costs, own] = [true, false].map((cost) => prices.filter((price) => price.cost === cost));
  const elements = (some) => some.map((price) => price.element);
  if (!own.length || !costs.length) place.replaceChildren(...elements(prices));
  else {
    const folded = make("details", {}, make("summary", {}, "What it costs the provider"));
    folded.append(...elements(costs));
    place.replaceChildren(...elements(own), folded);
  }
}

const valuesOf = (prices) =>
  Object.fromEntries([...prices].map(([name, price]) => [name, price.value]));

function makePolicy(policy, parameters, values, touched) {
  const prices = new Map();
  const known = Object.keys(PARAMETERS);
  const rank = (name) => (known.includes(name) ? known.indexOf(name) : known.length);
  for (const name of Object.keys(parameters).sort((a, b) => rank(a) - rank(b))) {
    const { default: value, help } = parameters[name];
    const words = PARAMETERS[name] ?? { label: capital(help), kind: "tokens", unit: "" };
    const scale = { ...SCALES[words.kind], signed: Boolean(words.signed) };
    prices.set(name, makePrice(`${policy}-${name}`, { ...words, scale }, values[name] ?? value, touched));
  }
  return prices;
}

function makeSensitivity(values, touched) {
  const prices = values.map((value, i) => {
    const words = { label: `Payoff points of a dollar to ${SIDES[i]}`, unit: "points a dollar" };
    return makePrice(`sensitivity-${i}`, { ...words, scale: SCALES.points }, value, touched);
  });
  byId("sensitivity").replaceChildren(...prices.map((price) => price.element));
  return prices;
}

// -> a function that says what the fields hold, or throws where the server knows nothing and neither
// does the user. A field that holds no number says what it said before.
function makeUsage(known, changed) {
  byId("use-unknown").hidden = known !== null;
  byId("use").open = known === null;
  const units = Object.entries({ input: "tokens read", output: "tokens written", requests: "requests" });
  const said = known ?? { input: [], output: [], requests: [1, 2, 1] };
  byId("usage").replaceChildren(...Object.values(MOVES).map((move, i) => {
    const fields = units.map(([unit, words]) => {
      const name = `${capital(move)}: ${words}`;
      const field = make("input", { type: "number", min: 0, step: "any", "aria-label": name });
      field.value = said[unit][i] === undefined ? "" : Number(said[unit][i].toPrecision(4));
      field.addEventListener("input", () => {
        if (!field.validity.valid || field.value === "") return;
        said[unit][i] = Number(field.value);
        changed();
      });
      return make("td", {}, field);
    });
    return make("tr", {}, make("th", { scope: "row" }, capital(move)), ...fields);
  }));
  return () => {
    if (units.every(([unit]) => [0, 1, 2].every((i) => i in said[unit]))) return said;
    throw new Refused("Fill in the expected use of each move: the server does not know it for this model.");
  };
}

// {"policy": "per_token", "output": 30, "cost_output": 6} -> "Per token: output $30".
function describe({ policy, ...values }) {
  const own = Object.keys(values).filter((name) => !PARAMETERS[name]?.cost);
  const told = (own.length ? own : Object.keys(values))
    .filter((name) => values[name] !== 0 || !PARAMETERS[name]?.signed)
    .map((name) => `${PARAMETERS[name]?.short ?? spaced(name)} ${dollars(values[name])}`);
  const name = POLICIES[policy]?.[0] ?? capital(spaced(policy));
  return told.length ? `${name}: ${told.join(", ")}` : name;
}
