// The playground: one prompt, answered with speculation and without.

import { streamEvents } from "./api.js";
import { byId, fixed, setText } from "./dom.js";
import { Answer } from "./tokens.js";

const MODES = [
  { speculation: "auto", name: "with speculation" },
  { speculation: "off", name: "without" },
];

let answers;
let running = null;

export function startPlayground(onUnauthorized) {
  answers = ["with", "without"].map(
    (name) => new Answer(byId(`${name}-text`), byId(`${name}-figures`)));
  byId("prompt-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running === null) run(onUnauthorized);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      byId("prompt-form").requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => running?.abort());
}

export function setHasChat(hasChat) {
  const option = byId("kind").querySelector("[value=chat]");
  option.disabled = !hasChat;
  setText(option, hasChat ? "chat message" : "chat message (no chat template)");
}

async function run(onUnauthorized) {
  const request = readForm();
  running = new AbortController();
  exchange(byId("send"), byId("stop"));
  setText(byId("prompt-error"), "");
  answers.forEach((answer) => answer.clear(request.isChat ? "" : request.prompt));
  try {
    if (byId("together").checked) {
      say("Answering, both at the same time…");
      await Promise.all(MODES.map((_, index) => answer(request, index)));
    } else {
      for (let index = 0; index < MODES.length; index++) {
        say(`Answering ${MODES[index].name}…`);
        await answer(request, index);
      }
    }
    say(verdict(request));
  } catch (error) {
    const wasStopped = error.name === "AbortError";
    running.abort(); // the other one too
    say(wasStopped ? "Stopped." : "");
    if (!wasStopped) setText(byId("prompt-error"), error.message);
    if (error.status === 401) onUnauthorized(error.message);
  } finally {
    running = null;
    exchange(byId("stop"), byId("send"));
  }
}

async function answer(request, index) {
  const shown = answers[index];
  shown.clear(request.isChat ? "" : request.prompt);
  const body = { ...request.body, speculation: MODES[index].speculation };
  for await (const event of streamEvents(request.path, body, running.signal)) shown.add(event);
}

function readForm() {
  const prompt = byId("prompt").value;
  const isChat = byId("kind").value === "chat";
  const body = {
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
    return_token_ids: true,
    return_token_sources: true,
    return_speculation_stats: true,
  };
  if (byId("seed").value !== "") body.seed = byId("seed").valueAsNumber;
  if (isChat) body.messages = [{ role: "user", content: prompt }];
  else body.prompt = prompt;
  const path = isChat ? "v1/chat/completions" : "v1/completions";
  return { prompt, isChat, path, body };
}

function verdict(request) {
  const [withDrafts, plain] = answers;
  let text = "Done.";
  if (withDrafts.rate && plain.rate) {
    text = `${fixed(withDrafts.rate, 1)} tokens/s with speculation, ` +
      `${fixed(plain.rate, 1)} without: ${fixed(withDrafts.rate / plain.rate, 2)} times.`;
  }
  if (request.body.temperature > 0 && request.body.seed === undefined) {
    return `${text} Drawn at random: the two follow one law and need not be equal.`;
  }
  const ids = plain.tokenIds;
  const at = ids.findIndex((id, index) => id !== withDrafts.tokenIds[index]);
  if (at < 0 && ids.length === withDrafts.tokenIds.length) return `${text} The same tokens.`;
  return `${text} Different from token ${(at < 0 ? ids.length : at) + 1} on, as scores that are ` +
    "equal to rounding allow.";
}

// Another button can be used from now on; the focus, if it is there, goes with that.
function exchange(former, next) {
  const hadFocus = document.activeElement === former;
  next.disabled = false;
  former.disabled = true;
  if (hadFocus) next.focus();
}

function say(text) {
  setText(byId("progress"), text);
}
