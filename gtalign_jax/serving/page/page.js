// The page: ask once, then drag prices. What is chosen follows each frame, the answer each rest.

import { makeCard, makeHistory } from "./answers.js";
import { Refused, chat, decide, readGame, setKey } from "./api.js";
import { between, calm, soon } from "./decisions.js";
import { makeMatrix } from "./matrix.js";
import { LAST, fromStep, makePrices, toStep } from "./prices.js";
import { drawHere, drawStrip, findSegments } from "./strip.js";
import { ALONE, MOVES, POLICIES, QUESTIONS, make } from "./words.js";

const REST = 300; // milliseconds without a change: the drag rests
const BASELINE = POLICIES[ALONE][0];
const STEERED = "With a price";
const EXAMPLES = [
  "Ben asks: What sound does it make?",
  "What is the capital of Norway? Ida must know.",
  "How do I repair my bike?",
  "Write a short thank-you note to Ana for the cake.",
];

const byId = (id) => document.getElementById(id);
const showEdited = makeMatrix(byId("edited"), "At these prices");
const showWritten = makeMatrix(byId("written"), "As the model wrote it");
const cards = { before: makeCard(byId("before")), after: makeCard(byId("after")) };
const history = makeHistory(byId("answered"), (answer) => {
  cards.before.show(answer, "To compare");
  byId("before").scrollIntoView({ block: "nearest" });
});

let model = null;
let prices = null; // the controls, once the server has told what there is to set
let turn = null; // the question: {question, seed, written, decided, move, mode}
let asking = null; // AbortController of the answer under way
let resting = 0; // timer
let surveyed = ""; // for which settings the strip is drawn

for (const question of EXAMPLES) {
  const button = make("button", { type: "button" }, question);
  button.addEventListener("click", () => { byId("question").value = question; startTurn(); });
  byId("examples").append(button);
}
byId("ask").addEventListener("submit", (event) => { event.preventDefault(); startTurn(); });
byId("stop").addEventListener("click", () => asking?.abort());
byId("again").addEventListener("click", () => { if (turn?.decided) follow(); else changed(); });
byId("key").addEventListener("change", () => { setKey(byId("key").value); guarded("ask-error", load); });
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
guarded("ask-error", load);

// What the server cannot do is said beside the control; anything else is a fault and stays one.
async function guarded(place, job) {
  const box = byId(place);
  try {
    await job();
    box.hidden = true;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    box.textContent = error.message;
    box.hidden = false;
    if (error.status === 401) byId("access").open = true;
  }
}

async function load() {
  if (prices !== null) return;
  const game = await readGame();
  model = game.model;
  prices ??= makePrices(game, changed);
  byId("model").textContent = `· ${model}`;
}

// ---- the question ----

async function startTurn() {
  const question = byId("question").value.trim();
  if (!question) return;
  setKey(byId("key").value);
  byId("ask-error").hidden = byId("answer-error").hidden = true;
  await guarded("ask-error", async () => {
    await load();
    const mine = { question, seed: prices.seed(), written: null, decided: null, move: null, mode: null };
    turn = mine;
    history.clear();
    byId("history").hidden = true;
    // What stood there for the question before stays in its place, dimmed, until this one has its own.
    const { dataset } = document.body;
    dataset.state = ["steerable", "asking"].includes(dataset.state) ? "asking" : "asked";
    try {
      await firstAnswer(mine);
    } finally {
      if (mine === turn && mine.written === null) dataset.state = "asked";
    }
  });
}

async function firstAnswer(mine) {
  cards.after.plain(STEERED, "The same move so far. Change a price until the model moves.");
  const first = await answer("before", { pricing: { policy: ALONE } }, BASELINE);
  if (first === null || mine !== turn) return;
  const { gtalign } = first;
  if (!gtalign?.written) {
    throw new Refused(`Prices cannot steer this answer: ${gtalign?.error ?? "no matrix in it"}.`);
  }
  mine.written = gtalign.written;
  mine.move = gtalign.decision.action;
  document.body.dataset.state = "steerable";
  surveyed = "";
  changed();
}

// Asks the question again under these prices, in place of what is being written for older ones.
function follow() {
  turn.move = turn.decided.decision.action;
  turn.mode = prices.mode();
  const terms = { ...prices.say(), mode: turn.mode };
  const mine = turn;
  byId("answer-error").hidden = true;
  guarded("answer-error", async () => {
    try {
      await answer("after", terms, STEERED);
    } catch (error) {
      mine.move = null; // the next rest tries again
      throw error;
    }
  });
}

// Streams one answer into a card -> the answer, or null where it was stopped or a newer one began.
async function answer(place, terms, title) {
  asking?.abort();
  const mine = new AbortController();
  asking = mine;
  byId("stop").hidden = false;
  const price = prices.describe(terms);
  const card = cards[place];
  card.start(title, price);
  const messages = [{ role: "user", content: turn.question }];
  const write = (text) => { if (mine === asking) card.write(text); };
  try {
    const reply = await chat({ model, messages, seed: turn.seed, ...terms }, write, mine.signal);
    if (mine !== asking) return null;
    const done = { ...reply, price };
    card.show(done, title);
    byId("history").hidden = history.add(done) < 2;
    say(`${title}: ${done.text}`);
    return done;
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (mine === asking) card.plain(title, stopped ? "Stopped." : "No answer.");
    if (stopped || mine !== asking) return null;
    throw error;
  } finally {
    if (mine === asking) {
      asking = null;
      byId("stop").hidden = true;
    }
  }
}

// ---- the prices ----

function changed() {
  if (!turn?.written) return;
  soon(() => guarded("game-error", decideNow));
  placeHere();
  restSoon(REST);
}

async function decideNow() {
  const mine = turn;
  let decided = null;
  try {
    decided = await decide({ payoff: mine.written, ...prices.say() });
  } finally { // also where it was refused: what was decided for older prices says nothing of these
    if (mine === turn) {
      turn.decided = decided;
      document.body.classList.toggle("undecided", decided === null);
      if (decided === null) showNoDecision();
      else showDecision(decided);
    }
  }
}

function showNoDecision() {
  byId("verdict-title").textContent = "No move at these prices";
  byId("verdict-before").textContent = "";
  byId("verdict").classList.remove("moved");
}

function showDecision({ decision, before, written, edited, money }) {
  const range = showWritten(written, { pareto: before.pareto, chosen: before.key });
  showEdited(edited, { pareto: decision.pareto, chosen: decision.key, range, money });
  const strong = make("strong", { id: "move" }, MOVES[decision.action]);
  byId("verdict-title").replaceChildren("At these prices the model ", strong);
  const moved = decision.action !== before.action;
  byId("verdict").classList.toggle("moved", moved);
  byId("verdict-before").textContent = moved
    ? `Without a price it ${MOVES[before.action]}.`
    : "Without a price it does the same.";
  byId("reasons").replaceChildren(...decision.reasons.map((reason) => make("li", {}, reason)));
  byId("asked-as").textContent = `It took yours for a ${QUESTIONS[before.key.split("_")[0]]}.`;
}

function restSoon(wait) {
  clearTimeout(resting);
  resting = setTimeout(rest, wait);
}

function rest() {
  if (!calm()) {
    restSoon(REST / 4);
    return;
  }
  if (!turn?.decided) return; // refused: the reason stands beside the matrix
  const { decision } = turn.decided;
  say(`At these prices the model ${MOVES[decision.action]}.`);
  if (decision.action !== turn.move || ![null, prices.mode()].includes(turn.mode)) follow();
  guarded("game-error", survey);
}

// ---- the strip: which move is chosen along the whole range of the price last touched ----

async function survey() {
  const price = prices.active();
  byId("strip").hidden = price === null;
  if (price === null) return;
  const settings = () => prices.active() && JSON.stringify([price.label, prices.sayAt(0), turn.written]);
  const mine = settings();
  if (mine === surveyed) return;
  surveyed = mine;
  const look = async (step) => {
    if (settings() !== mine) return null; // changed meanwhile: all further looks are equal, so it ends
    const body = { payoff: turn.written, ...prices.sayAt(step) };
    return (await between(() => decide(body))).decision.action;
  };
  const lapse = () => { if (mine === surveyed) surveyed = ""; }; // the next rest tries again
  const segments = await findSegments(LAST, look).catch((error) => {
    lapse();
    byId("strip").hidden = true; // what it shows is for older settings
    throw error;
  });
  if (settings() !== mine) {
    lapse();
    return;
  }
  const priceAt = (step) => price.write(fromStep(step, price.scale));
  byId("strip-least").textContent = priceAt(0);
  byId("strip-most").textContent = priceAt(LAST);
  byId("strip-title").textContent = `${price.label}: the move at each of them`;
  byId("strip-words").textContent = drawStrip(byId("strip-bar"), segments, LAST, priceAt);
  placeHere();
}

function placeHere() {
  const price = prices.active();
  if (price !== null) drawHere(byId("strip-bar"), toStep(price.value, price.scale) / LAST);
}

function say(text) {
  byId("said").textContent = text;
}
