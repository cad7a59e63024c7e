// What the console asks of the router, all of it beside the page.

let key = "";

// Kept here and nowhere else.
export function setKey(value) {
  key = value;
}

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function getState(signal) {
  const answer = await send("console/state", { signal });
  return answer.json();
}

// The answer's events as they come, and behind the last one the end.
export async function* streamEvents(path, body, signal) {
  const answer = await send(path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError(0, "the answer ended early");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const item = JSON.parse(data);
        if (item.error) throw new ApiError(0, item.error.message);
        yield item;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // an aborted stream has nothing left to cancel
  }
}

async function send(path, options) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, {
    ...options, headers, cache: "no-store", credentials: "same-origin", redirect: "error",
  });
  if (answer.ok) return answer;
  let message = `${answer.status} ${answer.statusText}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // A proxy's own answer: its status says enough.
  }
  throw new ApiError(answer.status, message);
}
