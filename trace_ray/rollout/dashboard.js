"use strict";
// The live page. Names come from outside: every value goes in as text, never as markup.

const DATA = "dashboard/data", KEY = "trace-ray-key", EVERY_MS = 3000, GIVE_UP_MS = 15000;
const SVG = "http://www.w3.org/2000/svg";
const CONTROL = /[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]/g;
const at = (id) => document.getElementById(id);
let shown = "", timer = 0, asks = 0;

const text = (value) => String(value).replace(CONTROL, "\ufffd");

function fill(node, children) {
  for (const child of [children].flat(9)) {
    if (child !== null && child !== undefined) {
      node.append(child instanceof Node ? child : text(child));
    }
  }
  return node;
}

function el(name, css, ...children) {
  const node = document.createElement(name);
  if (css) node.className = css;
  return fill(node, children);
}

function svg(name, attributes, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return fill(node, children);
}

const share = (value) => (100 * value).toFixed(1).replace(".0", "") + "%";
const points = (value) => (value > 0 ? "+" : "") + (100 * value).toFixed(0);
const part = (count, n) => (n ? `${count} of ${n} (${share(count / n)})` : "-");
const seconds = (value) => (value === null ? "-" : value.toFixed(value < 1 ? 3 : 1) + " s");
const clock = (value) => (value === null ? "-" : new Date(1000 * value).toLocaleTimeString());
const range = (found, show) => `${show(found.value)} [${show(found.ci_low)}, ${show(found.ci_high)}]`;

function table(caption, heads, rows, numbers) {
  const css = (index) => (numbers.includes(index) ? "n" : "");
  const head = el("tr", "", heads.map((name, index) => el("th", css(index), name)));
  const body = rows.map((cells) => el("tr", "", cells.map((cell, index) => el("td", css(index), cell))));
  const found = el("table", "", head, body);
  found.setAttribute("aria-label", text(caption));
  return [el("p", "soft", caption), el("div", "wide", found)];
}

// An estimate and its interval on a scale from low to 1, with a line at 0.
function mark(found, low, css, margin) {
  const x = (value) => (8 + (184 * (value - low)) / (1 - low)).toFixed(1);
  const line = (from, to, y1, y2, name) =>
    svg("line", { x1: x(from), x2: x(to), y1, y2, class: name });
  return svg("svg", { viewBox: "0 0 200 20", class: "mark", "aria-hidden": "true" },
    line(low, 1, 10, 10, "grid"), line(0, 0, 2, 18, ""),
    margin ? svg("line", { x1: x(-margin), x2: x(-margin), y1: 2, y2: 18, "stroke-dasharray": 2 }) : null,
    line(found.ci_low, found.ci_high, 10, 10, `${css} thick`),
    svg("circle", { cx: x(found.value), cy: 10, r: 4, class: css }));
}

function bar(value, css) {
  const width = (196 * value).toFixed(1);
  return svg("svg", { viewBox: "0 0 200 16", class: "mark", "aria-hidden": "true" },
    svg("rect", { x: 2, y: 2, width: 196, height: 12, class: "rest" }),
    svg("rect", { x: 2, y: 2, width, height: 12, class: css }));
}

function fleet(data) {
  const cards = data.models.map((model) => el("section", "card", el("h3", "", model.name),
    el("p", "", "answers as ", el("strong", "", model.answers_as)),
    el("p", "soft", model.base),
    el("p", "", `compliance: ${model.mode}`, model.policy ? ` under ${model.policy}` : "",
      model.shadow_policy ? `; next: ${model.shadow_policy}` : ""),
    el("p", "soft", model.adapters.length ? "adapters: " + model.adapters.join(", ") : "no adapters")));
  const names = data.names.map((row) => [row.name, row.adapter]);
  return [el("h2", "", "Fleet"), el("div", "cards", cards),
    table("Names that may move, and where they lead now", ["name", "adapter"], names, [])];
}

function registry(found) {
  if (!found) return null;
  const lines = [];
  if (found.problem) lines.push(found.problem);
  if (found.refused.length) lines.push("not put in service: " + found.refused.join(", "));
  return lines.map((line) => el("p", "bad", line));
}

function rollout(data) {
  const found = data.rollout;
  if (!found) return null;
  const waves = found.waves === null ? "" : ` of ${found.waves}`;
  const head = el("p", "", el("strong", "", found.status),
    `, wave ${found.wave}${waves}, soaked ${found.soaked_s.toFixed(0)} s, last step at ${clock(found.at)}`);
  const tests = found.tests.map((test) => [test.model, test.test,
    part(test.champion_good, test.champion_n), part(test.candidate_good, test.candidate_n),
    test.difference ? mark(test.difference, -1, "after", test.test === "compliance" && found.margin) : "-",
    test.difference ? range(test.difference, points) : "-", test.decision]);
  return [el("h2", "", "Rollout"), head, found.reason ? el("p", "bad", found.reason) : null,
    table("Candidate against champion, as the last step left it: what complied, succeeded, came in time. " +
      "The interval of the difference, in points, holds at any time; dashed: the margin.",
    ["model", "test", "champion", "candidate", "difference", "points", "decision"], tests, [2, 3, 5])];
}

function watched(rows) {
  if (!rows.length) return null;
  const cells = rows.map((row) => [row.model, row.adapter, part(row.complied, row.judged),
    part(row.recent_complied, row.recent), share(row.floor)]);
  return table("Champions under watch, as its last step left them: judged replies that comply",
    ["model", "adapter", "all", "newest", "floor"], cells, [2, 3, 4]);
}

function traffic(live, splits) {
  if (!live || !live.traffic.length) return null;
  const rows = live.traffic.flatMap((row) => {
    const n = row.champion_n + row.candidate_n;
    const side = (name, css, wanted) => [row.model, el("span", `key-${css}`, name), row[name],
      n ? bar(row[`${name}_n`] / n, css) : "-", part(row[`${name}_n`], n), share(wanted),
      row[`${name}_failed`], splits[row.model] === true ? "yes" : "no"];
    return [side("champion", "before", 1 - row.share), side("candidate", "after", row.share)];
  });
  return table("Traffic: who answered of late, and the share that the rollout wants",
    ["model", "side", "adapter", "", "answered", "wanted", "failed", "split now"], rows, [4, 5, 6]);
}

function compliance(live) {
  const adapters = live.compliance.map((row) => [row.model, row.adapter, row.policy,
    row.share ? mark(row.share, 0, "after") : "-", row.share ? range(row.share, share) : "-",
    row.violates, row.unjudged]);
  const clauses = live.clauses.map((row) => [row.model, row.policy, row.clause || "(none named)",
    row.violations, row.judged, row.share ? range(row.share, share) : "-"]);
  const since = live.since === null ? "" : ` since ${clock(live.since)}`;
  return [el("h2", "", "Live compliance"), el("p", "soft", `the last ${live.decisions} verdicts${since}`),
    table("Judged replies that comply, 95% intervals",
      ["model", "adapter", "policy", "", "comply", "violate", "unjudged"], adapters, [4, 5, 6]),
    table("Violations by clause; a verdict names the gravest one",
      ["model", "policy", "clause", "violations", "of replies", "share"], clauses, [3, 4, 5])];
}

function shadow(live) {
  if (!live.shadow.length) return null;
  const rows = live.shadow.map((row) => [row.model, row.policy, part(row.agree, row.judged),
    part(row.would_block, row.judged), row.unjudged]);
  return [el("h2", "", "Next policy, in the shadow"),
    table("Replies judged under both policies", ["model", "policy", "same verdict", "would be blocked",
      "unjudged"], rows, [2, 3, 4])];
}

function decisions(live) {
  const signs = { complies: ["good", "✓ "], violates: ["bad", "✗ "], unjudged: ["", "? "] };
  const rows = live.last.map((row) => [clock(row.time), row.model, row.adapter,
    el("span", signs[row.label][0], signs[row.label][1] + row.label), row.clause || "-", row.act,
    seconds(row.judge_s), seconds(row.request_s)]);
  return [el("h2", "", "Last decisions"), table("Newest first; the time of a request is known while its " +
    "traffic is split", ["time", "model", "adapter", "verdict", "clause", "act", "judged in", "request"],
  rows, [6, 7])];
}

function draw(data) {
  const places = [...document.querySelectorAll(".wide")].map((node) => node.scrollLeft);
  const live = data.live;
  const parts = [data.problems.map((line) => el("p", "bad", line)), registry(data.registry), fleet(data),
    rollout(data), watched(data.watched), traffic(live, data.splits),
    live ? [compliance(live), shadow(live), decisions(live)] : el("p", "", "Decisions are not recorded.")];
  at("data").replaceChildren();
  fill(at("data"), parts);
  document.querySelectorAll(".wide").forEach((node, index) => { node.scrollLeft = places[index] || 0; });
}

function refused(status) {
  at("data").replaceChildren();
  shown = "";
  at("ask").hidden = false;
  at("forget").hidden = true;
  const had = sessionStorage.getItem(KEY);
  at("status").textContent = !had ? "a key is needed" :
    status === 403 ? "that key is not an admin's" : "that key is not valid";
  sessionStorage.removeItem(KEY);
  at("key").focus();
}

async function look() {
  clearTimeout(timer);
  timer = 0;
  const mine = ++asks, key = sessionStorage.getItem(KEY);
  let again = true;
  try {
    if (document.hidden && shown) return;
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const signal = AbortSignal.timeout(GIVE_UP_MS);
    const answer = await fetch(DATA, { headers, signal, cache: "no-store", redirect: "error" });
    if (mine !== asks) return;
    if (answer.status === 401 || answer.status === 403) {
      again = false;
      refused(answer.status);
      return;
    }
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const data = await answer.json();
    if (mine !== asks) return;
    at("ask").hidden = true;
    at("forget").hidden = !key;
    at("status").textContent = `as of ${clock(data.at)}`;
    at("data").classList.remove("old");
    const ages = { at: 0, read_s_ago: 0 };
    const now = JSON.stringify(data, (name, value) => (name in ages ? 0 : value));
    if (now !== shown) draw(data);
    shown = now;
  } catch (error) {
    if (mine !== asks) return;
    at("data").classList.add("old");
    at("status").textContent = `no data at ${clock(Date.now() / 1000)}: ${text(error.message)}`;
  } finally {
    if (mine === asks && again) timer = setTimeout(look, EVERY_MS);
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  at("key").value = "";
  look();
});
at("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  look();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && timer) look(); });
look();
