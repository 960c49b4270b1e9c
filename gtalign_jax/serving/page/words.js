// The names that a user reads, and how numbers are written.

export const MOVES = { DA: "answers directly", CQ: "asks back", AQ: "answers and asks" };
export const QUESTIONS = { VQ: "vague question", DQ: "detailed question" };
export const KEYS = Object.keys(QUESTIONS).flatMap((u) => Object.keys(MOVES).map((a) => `${u}_${a}`));
export const ALONE = "none";

// [name, what it means]
export const POLICIES = {
  subscription: ["Subscription", "A turn costs you nothing; the provider bears what it takes."],
  per_token: ["Per token", "You pay for every token read and written; the provider earns on each."],
  per_request: ["Per request", "You pay for every request, however long. Being asked back makes it two."],
  free: ["Free", "Advertising pays, or a number of free requests that you use up."],
  given: ["Rates of your own", "What each side gains (+) or pays (−)."],
  none: ["Without a price", "No money changes hands, and nothing costs."],
};
export const RULES = {
  pareto_welfare: ["Largest sum on the Pareto set", "What the model was trained to do."],
  utilitarian: ["Largest sum", "Both payoffs together, and nothing else."],
  nash_product: ["Nash bargaining", "The largest product of what each side gains over its worst cell."],
  egalitarian: ["Best for whoever gets less", "The cell whose smaller payoff is largest."],
  stackelberg: ["The model leads", "It takes the move that pays it best, once you have replied your best."],
};
export const MODES = {
  action: ["The payoffs and the chosen move", "The model goes on from the move that the rule chose."],
  matrix: ["The payoffs alone", "The model analyses them itself, and may choose otherwise."],
};
export const ROWS = {
  played: ["The row of your question", "Prices change what the model does, not how you asked."],
  all: ["All six", "As if you might have asked otherwise, too."],
};

// The parameters of the policies. `kind`: the scale of its slider; `cost`: the provider's own, shown
// folded where there is a price to look at first; `first`: the price whose whole range is drawn.
const token = (label, short, more = {}) => (
  { label, money: "US dollars", short, kind: "tokens", unit: "dollars", ...more }
);
const request = (label, short, more = {}) => token(label, short, { kind: "request", ...more });
export const PARAMETERS = {
  output: token("Price of a million output tokens", "output", { first: true }),
  input: token("Price of a million input tokens", "input"),
  price: request("Price of a request", "request", { first: true }),
  nuisance: request("Price of an advertisement in your attention", "attention", { first: true }),
  quota: request("Worth of a free request to you", "quota"),
  ads: request("Advertising income of a request", "advertising"),
  cost_output: token("Cost of a million output tokens", "provider's output", { cost: true }),
  cost_input: token("Cost of a million input tokens", "provider's input", { cost: true }),
  user_output: token("You, per million output tokens", "you by output", { signed: true, first: true }),
  user_input: token("You, per million input tokens", "you by input", { signed: true }),
  user_request: request("You, per request", "you by request", { signed: true }),
  llm_output: token("The model, per million output tokens", "model by output", { signed: true }),
  llm_input: token("The model, per million input tokens", "model by input", { signed: true }),
  llm_request: request("The model, per request", "model by request", { signed: true }),
};

const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const cash = (digits) => new Intl.NumberFormat("en", {
  style: "currency", currency: "USD", minimumFractionDigits: 0, maximumSignificantDigits: digits,
});
const [exact, rough] = [cash(3), cash(2)];

export const number = (value) => short.format(value).replace("-", "−");
export const dollars = (value) => exact.format(value).replace("-", "−");
export const about = (value) => rough.format(value).replace("-", "−");

// A payoff keeps one decimal, so that columns of numbers stand still while they change.
export function payoff(value) {
  return value.toFixed(Math.abs(value) < 99.95 ? 1 : 0).replace(/^-0\.0$/, "0.0").replace("-", "−");
}

export const spaced = (name) => name.replaceAll("_", " ");

export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

// make("p", {class: "help"}, "text", node…): everything from outside becomes a text node.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
