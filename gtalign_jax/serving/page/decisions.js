// One decision is asked of the server at a time: the newest live one first, surveys in the gaps.

let busy = false;
let next = null; // the live job that runs at the next frame with a free line

// Runs `job` at the next frame; a job that has not started yet is forgotten for the newer one.
export function soon(job) {
  if (next === null && !busy) requestAnimationFrame(run);
  next = job;
}

export const calm = () => !busy && next === null;

// Runs `job` as soon as nothing live waits.
export async function between(job) {
  while (!calm()) await new Promise(requestAnimationFrame);
  return alone(job);
}

async function run() {
  if (busy || next === null) return;
  const job = next;
  next = null;
  await alone(job);
}

async function alone(job) {
  busy = true;
  try {
    return await job();
  } finally {
    busy = false;
    if (next !== null) requestAnimationFrame(run);
  }
}
