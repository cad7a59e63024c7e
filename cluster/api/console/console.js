// Starts the parts, asks for the state once a second, and for a key where one is needed.

import { getState, setKey } from "./api.js";
import { Charts } from "./charts.js";
import { showCluster } from "./cluster.js";
import { byId, setText } from "./dom.js";
import { setHasChat, startPlayground } from "./playground.js";

const PERIOD_MS = 1_000;
const TIMEOUT_MS = 5_000;

const charts = new Charts(byId("charts"));
const pause = byId("pause");
let isPaused = false;
let timer = 0;
let isAsking = false;

async function refresh() {
  clearTimeout(timer);
  if (isAsking || isPaused || document.hidden || !byId("key-form").hidden) return;
  isAsking = true;
  try {
    const state = await getState(AbortSignal.timeout(TIMEOUT_MS));
    showCluster(state);
    setHasChat(state.has_chat_template);
    charts.add(state, performance.now());
    notice("");
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    else notice(`No state from the router (${error.message}); asking again.`);
  }
  isAsking = false;
  timer = setTimeout(refresh, PERIOD_MS);
}

function notice(text) {
  const node = byId("notice");
  node.hidden = !text;
  setText(node, text);
}

function askForKey(message) {
  byId("key-form").hidden = false;
  setText(byId("key-error"), message);
  setText(byId("summary"), "An API key is needed.");
  byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  byId("key").value = "";
  byId("key-form").hidden = true;
  setText(byId("key-error"), "");
  byId("prompt").focus();
  refresh();
});

pause.addEventListener("click", () => {
  isPaused = !isPaused;
  pause.setAttribute("aria-pressed", `${isPaused}`);
  refresh();
});

document.addEventListener("visibilitychange", refresh);
startPlayground(askForKey);
if (document.body.dataset.apiKey === "needed") askForKey("");
else refresh();
