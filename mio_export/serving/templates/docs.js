"use strict";

const name = "NAME";
const facts = [["space", "Space"], ["artifact", "Artifact"], ["artifact_sha256", "sha256"], ["precision", "Precision"],
  ["runtime", "Runtime"], ["device", "Device"], ["decode", "Decoding"]];
let key = "";

/** Return an element; strings among its children are text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (attribute.startsWith("on")) made.addEventListener(attribute.slice(2), value);
    else if (value !== false && value !== undefined) made.setAttribute(attribute, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

/** Return text in which `this` is code. */
function prose(text = "") {
  return text.split("`").map((part, index) => index % 2 ? element("code", {}, part) : part);
}

function headers() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Follow a reference of the description. */
function resolved(api, value) {
  if (!value || !value.$ref) return value;
  const steps = value.$ref.slice(2).split("/").map((step) => step.replaceAll("~1", "/").replaceAll("~0", "~"));
  return steps.reduce((inner, step) => inner[step], api);
}

/** Return a type in a word or two. */
function kind(api, given) {
  const schema = resolved(api, given) || {};
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.const !== undefined) return String(schema.const);
  if (schema.oneOf) return schema.oneOf.map((one) => kind(api, one)).join(" | ");
  if (schema.type === "array") {
    const inner = kind(api, schema.items);
    return inner ? `list of ${inner}` : "list";
  }
  return [schema.type || ""].flat().join(" | ");
}

function row(title, note, ...cells) {
  const head = element("th", { scope: "row" }, element("code", {}, title), note ? element("small", {}, note) : null);
  return element("tr", {}, head, ...cells.map((cell) => element("td", {}, ...[cell].flat())));
}

function table(rows) {
  return element("div", { class: "wide" }, element("table", {}, element("tbody", {}, ...rows)));
}

/** Return the rows of an object's fields, those of the objects inside indented by their path. */
function fields(api, given, before = "") {
  const schema = resolved(api, given);
  const required = new Set(schema.required);
  return Object.entries(schema.properties || {}).flatMap(([field, value]) => {
    const inner = resolved(api, value);
    const items = inner.type === "array" ? resolved(api, inner.items) : inner;
    const path = `${before}${field}${inner.type === "array" && items.properties ? "[]" : ""}`;
    const below = items.properties ? fields(api, items, `${path}.`) : [];
    const note = required.has(field) ? "required" : "";
    const text = inner.description || (below.length ? "" : kind(api, inner));
    const own = inner.description && !below.length ? `${kind(api, inner)}. ${text}` : text;
    return inner.description || !below.length ? [row(path, note, prose(own)), ...below] : below;
  });
}

function copyButton(text) {
  const button = element("button", { type: "button", class: "copy", onclick: copy }, "Copy");
  async function copy() {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Press Ctrl-C";
      getSelection().selectAllChildren(button.closest(".code").querySelector("pre"));
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }
  return button;
}

/** Return code with a tab for each sample. */
function code(samples) {
  const place = element("code");
  const tabs = samples.map((sample, index) =>
    element("button", { type: "button", role: "tab", onclick: () => show(index) }, sample.label));
  function show(chosen) {
    place.textContent = samples[chosen].source;
    tabs.forEach((tab, index) => tab.setAttribute("aria-selected", index === chosen));
  }
  show(0);
  const names = samples.length > 1 ? tabs : [element("span", {}, samples[0].label)];
  const bar = element("div", { class: "bar", role: samples.length > 1 ? "tablist" : false }, ...names,
    copyButton(() => place.textContent));
  return element("div", { class: "code" }, bar, element("pre", { tabindex: "0" }, place));
}

/** Let a sample call this very server. */
function here(source) {
  const open = source.replaceAll("http://127.0.0.1:8000", location.origin).replaceAll("127.0.0.1:8000", location.host);
  return key ? open.replaceAll("curl ", "curl --header \"Authorization: Bearer $MIO_API_KEY\" ") : open;
}

function example(body) {
  const json = body && body.content && body.content["application/json"];
  if (!json || !json.example) return null;
  return JSON.stringify(json.example, null, 2) // lists of plain values on one line
    .replace(/\[[^[\]{}]*\]/g, (list) => list.replace(/\s+/g, " ").replace("[ ", "[").replace(" ]", "]"));
}

/** Return all that is said of a call. */
function call(api, path, method, operation, common) {
  const parameters = [...(common || []), ...(operation.parameters || [])];
  const body = operation.requestBody;
  const answers = Object.entries(operation.responses).map(([status, answer]) => [status, resolved(api, answer)]);
  const good = answers.filter(([status]) => status < 400);
  const bad = answers.filter(([status]) => status >= 400);
  const isOpen = (operation.security || []).length === 1;
  const answered = good.map(([, answer]) => answer.content && answer.content["application/json"]).find(Boolean);
  const left = [
    operation.description ? element("p", {}, ...prose(operation.description)) : null,
    ...(parameters.length ? [element("h4", {}, "Parameters"), table(parameters.map((parameter) =>
      row(parameter.name, parameter.in, prose(parameter.description))))] : []),
    ...(body ? [element("h4", {}, "Takes"), table(fields(api, body.content["application/json"].schema))] : []),
    element("h4", {}, "Gives"),
    table(good.map(([status, answer]) =>
      row(status, "", [...prose(answer.description), ...(answer.content && !answered ? [element("br"),
        element("small", {}, Object.keys(answer.content).join(", "))] : [])]))),
    answered ? element("details", {}, element("summary", {}, "Fields of the answer"), table(fields(api, answered.schema)))
      : null,
    bad.length ? element("details", {}, element("summary", {}, `Errors: ${bad.map(([status]) => status).join(", ")}`),
      table(bad.map(([status, answer]) => row(status, answer.headers ? "Retry-After" : "", prose(answer.description)))))
      : null,
  ];
  const samples = (operation["x-codeSamples"] || []).map((sample) => ({ ...sample, source: here(sample.source) }));
  const sent = example(body);
  const got = good.map(([, answer]) => example(answer)).find(Boolean);
  const right = [
    samples.length ? code(samples) : null,
    sent ? code([{ label: "Request", source: sent }]) : null,
    got ? code([{ label: "Answer", source: got }]) : null,
  ].filter(Boolean);
  const title = element("h3", {}, element("span", { class: `method ${method}` }, method.toUpperCase()),
    element("span", { class: "path" }, element("a", { href: `#${operation.operationId}` }, path)),
    isOpen ? element("span", { class: "open" }, "asks for no key") : null);
  return element("article", { id: operation.operationId }, title,
    element("p", { class: "summary" }, operation.summary),
    element("div", { class: "columns" }, element("div", {}, ...left.filter(Boolean)),
      right.length ? element("div", {}, ...right) : null));
}

function build(api) {
  document.getElementById("intro").replaceChildren(...prose(api.info.description));
  const nav = document.getElementById("nav");
  const calls = document.getElementById("calls");
  nav.replaceChildren(element("h3", {}, "This server"), element("a", { href: "#served" }, "What is served"),
    element("a", { href: "#try" }, "Try it"));
  calls.replaceChildren();
  for (const tag of api.tags) {
    nav.append(element("h3", {}, tag.name));
    calls.append(element("h2", {}, tag.name), element("p", {}, ...prose(tag.description)));
    for (const [path, item] of Object.entries(api.paths)) {
      for (const method of ["get", "post"]) {
        const operation = item[method];
        if (!operation || !operation.tags.includes(tag.name)) continue;
        nav.append(element("a", { href: `#${operation.operationId}` },
          element("span", { class: `method ${method}` }, method.toUpperCase()), element("span", {}, path)));
        calls.append(call(api, path, method, operation, item.parameters));
      }
    }
  }
}

async function state() {
  const place = document.getElementById("state");
  try {
    const { ok } = await fetch("v2/health/ready");
    place.textContent = ok ? "ready" : "not ready: it starts or ends";
    place.className = ok ? "good" : "bad";
  } catch {
    place.textContent = "not reached";
    place.className = "bad";
  }
}

async function served() {
  const answer = await fetch(`v2/models/${name}/config`, { headers: headers() });
  document.getElementById("key").hidden = answer.status !== 401 && !key;
  if (!answer.ok) return;
  const config = await answer.json();
  const said = facts.map(([id, title]) => [title, (config.parameters[id] || {}).string_value]);
  const shape = config.output[0].dims[0];
  const rows = [...said, ["Embedding", `float32 (N, ${shape})`], ["Images a request", `at most ${config.max_batch_size}`]];
  const list = document.getElementById("facts");
  list.replaceChildren(...[...list.children].slice(0, 2), ...rows.filter(([, value]) => value).flatMap(([title, value]) =>
    [element("dt", {}, title), element("dd", {}, element("code", {}, value))]));
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function cosine(first, second) {
  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  return dot(first, second) / Math.sqrt(dot(first, first) * dot(second, second));
}

async function embed(files) {
  const place = document.getElementById("result");
  if (!files.length) return place.replaceChildren();
  place.replaceChildren(element("p", {}, "…"));
  const images = { name: "images", datatype: "BYTES", shape: [files.length, 1], data: await Promise.all(files.map(base64)) };
  const start = performance.now();
  const answer = await fetch(`v2/models/${name}/infer`, { method: "POST", body: JSON.stringify({ inputs: [images] }),
    headers: { ...headers(), "Content-Type": "application/json" } });
  const found = await answer.json();
  const took = performance.now() - start;
  if (!answer.ok) return place.replaceChildren(element("p", { class: "failed" }, `${answer.status}: ${found.error}`));
  const outputs = Object.fromEntries(found.outputs.map((output) => [output.name, output]));
  const width = outputs.embedding.shape[1];
  const vectors = files.map((_, index) => outputs.embedding.data.slice(index * width, (index + 1) * width));
  const first = outputs.error.data.findIndex((error) => !error);
  const rows = files.map((file, index) => {
    const error = outputs.error.data[index];
    const numbers = vectors[index].slice(0, 4).map((value) => value === null ? "" : value.toFixed(4)).join(", ");
    return element("tr", {}, element("th", { scope: "row" }, file.name), error
      ? element("td", { colspan: "2", class: "failed" }, error)
      : element("td", { class: "number" }, `${numbers}, …`),
      error ? null : element("td", { class: "number" }, cosine(vectors[first], vectors[index]).toFixed(5)));
  });
  const head = ["Image", `First of ${width} numbers`, "Cosine to the first"].map((title) => element("th", {}, title));
  return place.replaceChildren(
    element("div", { class: "wide" }, element("table", {}, element("thead", {}, element("tr", {}, ...head)),
      element("tbody", {}, ...rows))),
    element("p", { class: "summary" }, `${files.length} images in ${took.toFixed(0)} ms, the way here and back included`));
}

async function start() {
  const api = await (await fetch("openapi.json")).json();
  build(api);
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  document.getElementById("files").addEventListener("change", (event) => embed([...event.target.files]).catch((error) =>
    document.getElementById("result").replaceChildren(element("p", { class: "failed" }, String(error)))));
  document.getElementById("key").addEventListener("submit", (event) => {
    event.preventDefault();
    key = event.target.querySelector("input").value;
    build(api);
    served();
  });
  state();
  setInterval(state, 10000);
  served();
}

start();
