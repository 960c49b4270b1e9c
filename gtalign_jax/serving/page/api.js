// What the page asks of the server, and what goes wrong there, in words. The key lives only here.

let key = "";

export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function setKey(text) {
  key = text.trim();
}

export const readGame = async () => (await call("v1/game")).json();

export const decide = async (body) => (await call("v1/game/decide", body)).json();

// Asks, streaming: onText(text so far) -> {text, gtalign, tokens, reason}. Aborting rejects with AbortError.
export async function chat(body, onText, signal) {
  const stream = { stream: true, stream_options: { include_usage: true } };
  const reply = await call("v1/chat/completions", { ...body, ...stream }, signal);
  const answer = { text: "", gtalign: null, tokens: null, reason: null };
  try {
    for await (const data of events(reply.body)) {
      if (data === "[DONE]") break;
      take(JSON.parse(data), answer);
      onText(answer.text);
    }
  } catch (error) {
    if (error instanceof Refused || error.name === "AbortError") throw error;
    throw new Refused("The connection broke off in the middle of the answer. Ask again.");
  }
  if (answer.reason === null) {
    throw new Refused("The server ended before the answer did. Ask again.");
  }
  return answer;
}

function take(chunk, answer) {
  if (chunk.error) throw new Refused(sentence(chunk.error.message));
  if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
  for (const choice of chunk.choices) {
    answer.text += choice.delta.content ?? "";
    answer.gtalign = choice.delta.gtalign ?? answer.gtalign;
    answer.reason = choice.finish_reason ?? answer.reason;
  }
}

// The data of each server-sent event; a line may arrive in pieces.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}

async function call(path, body, signal) {
  if (/[^\x20-\x7e]/.test(key)) {
    throw new Refused("The key holds a character that no key can have. Type it again.", 401);
  }
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it running, and are you online?");
  }
  if (!reply.ok) throw new Refused(await words(reply), reply.status);
  return reply;
}

async function words(reply) {
  if (reply.status === 401) {
    return key ? "The server does not know this key." : "The server asks for a key.";
  }
  if (reply.status === 429) {
    const wait = Math.ceil(Number(reply.headers.get("Retry-After")));
    return `The server is busy. Ask again in ${wait > 1 ? `${wait} seconds` : "a second"}.`;
  }
  const told = await reply.json().catch(() => null);
  const message = told?.error?.message ?? `it answered with status ${reply.status}`;
  return `The server refused: ${sentence(message)}`;
}

const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);
