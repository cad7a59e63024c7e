// Topology and state: routers, replicas with their shards, drafters.

import { byId, element, fixed, resized, setFacts, setRows, setText } from "./dom.js";

export function showCluster(state) {
  const numReady = state.replicas.filter(({ state: is }) => is === "ready").length;
  setText(byId("summary"), `${state.model}, version ${state.version}: ` +
    `${numReady} of ${counted(state.replicas.length, "replica")} ready, ` +
    `${counted(state.num_active_requests, "request")} on this router`);
  const routers = state.routers.length
    ? state.routers : [{ router_id: state.router_id, address: "" }];
  setRows(byId("routers").tBodies[0], routers.map(({ router_id, address }) =>
    [router_id, address, router_id === state.router_id ? "answered this page" : ""]));
  const sections = resized(byId("replicas"), state.replicas.length, makeReplica);
  state.replicas.forEach((replica, index) => showReplica(sections[index], replica));
}

function makeReplica() {
  const table = (...headings) => element("table", {},
    element("thead", {}, element("tr", {},
      ...headings.map((text) => element("th", { scope: "col" }, text)))),
    element("tbody"));
  const scroll = (child) => element("div", { class: "scroll", tabindex: "0", role: "region" }, child);
  return element("section", {}, element("h3"), element("dl", { class: "facts" }),
    scroll(table("shard", "where", "part of the model")),
    scroll(table("drafter", "address", "state", "round trip")));
}

function showReplica(section, replica) {
  const [title, facts, shards, drafters] = section.children;
  const why = replica.reason ? ` (${replica.reason})` : "";
  setText(title, `Replica ${replica.replica_id}: ${replica.state}${why}`);
  setFacts(facts, factsOf(replica));
  shards.setAttribute("aria-label", `Shards of ${replica.replica_id}`);
  drafters.setAttribute("aria-label", `Drafters of ${replica.replica_id}`);
  shards.hidden = !replica.shards.length;
  setRows(shards.firstChild.tBodies[0], replica.shards.map((shard) => [
    `${shard.rank}`, `${shard.node}, process ${shard.pid}`,
    `pipeline stage ${shard.pipeline_stage}, tensor rank ${shard.tensor_rank}`]));
  drafters.hidden = !replica.drafters.length;
  setRows(drafters.firstChild.tBodies[0], replica.drafters.map((drafter) => [
    drafter.drafter_id, drafter.address,
    drafter.reason ? `${drafter.state}: ${drafter.reason}` : drafter.state,
    drafter.round_trip_ms ? `${fixed(drafter.round_trip_ms, 1)} ms` : "none yet"]));
}

function factsOf(replica) {
  const { speculation: stats, switch: mode, prefix_cache: cache } = replica;
  const length = stats.num_drafts ? 1 + stats.num_accepted_tokens / stats.num_drafts : null;
  const facts = [
    ["address", replica.address],
    ["load", `${replica.num_running} running, ${replica.num_waiting} waiting, ` +
      `KV cache ${fixed(100 * replica.kv_cache_usage, 0)}% held, ` +
      `${fixed(replica.num_output_tokens, 0)} tokens so far`],
    ["speculation", `${replica.speculation_state}: ${replica.speculation_reason}`],
    ["mode", `${mode.mode} for ${duration(mode.seconds_in_state)}, ` +
      `${counted(mode.num_flips, "flip")} so far, ${fixed(mode.drafter_demand, 2)} drafters kept busy`],
    ["acceptance", length === null ? "nothing verified yet" :
      `length ${fixed(length, 2)} over ${fixed(stats.num_drafts, 0)} rounds, ` +
      `${fixed(stats.num_draft_tokens / stats.num_drafts, 2)} drafts verified a round`],
  ];
  if (replica.speculation_method) {
    facts.push(["drafter", `${replica.speculation_method} ${replica.speculation_model}`]);
  }
  const lost = stats.num_late_proposals + stats.num_stale_proposals + stats.num_malformed_proposals;
  if (lost) {
    facts.push(["proposals unused", `${stats.num_late_proposals} late, ` +
      `${stats.num_stale_proposals} stale, ${stats.num_malformed_proposals} malformed`]);
  }
  if (replica.calibration_error !== null) {
    facts.push(["confidence", `${fixed(100 * replica.calibration_error, 1)}% off`]);
  }
  if (cache.num_queried_tokens) {
    const share = 100 * cache.num_hit_tokens / cache.num_queried_tokens;
    facts.push(["prefix cache", `${fixed(share, 0)}% of prompt tokens found`]);
  }
  if (replica.paced) {
    facts.push(["paced", `as ${replica.paced.profile}, time × ${replica.paced.time_scale}`]);
  }
  return facts;
}

const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function duration(seconds) {
  if (seconds < 90) return `${fixed(seconds, 0)} s`;
  return seconds < 5400 ? `${fixed(seconds / 60, 0)} min` : `${fixed(seconds / 3600, 1)} h`;
}
