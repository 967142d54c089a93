// /metrics is what Prometheus reads: https://prometheus.io/docs/instrumenting/exposition_formats (text, 0.0.4).
import { expect, test } from "vitest";
import { API_KEY, eventsOf, testApp } from "./harness.ts";

interface Family {
  help?: string;
  type?: string;
  readonly samples: { readonly name: string; readonly labels: Record<string, string>; readonly value: number }[];
}

/** Throws where the text is not as the format says: one HELP and TYPE before a family's samples, no sample twice, a line feed at the end. */
function parsed(text: string): Map<string, Family> {
  if (!text.endsWith("\n")) throw new Error("must end with a line feed");
  const families = new Map<string, Family>();
  const seen = new Set<string>();
  let [current, name]: [Family, string] = [{ samples: [] }, ""];
  for (const line of text.slice(0, -1).split("\n")) {
    const [, word, of = "", rest = ""] = /^# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.+)$/.exec(line) ?? [];
    if (word === "HELP") {
      if (families.has(of)) throw new Error(`${of} comes twice`);
      [current, name] = [{ help: rest, samples: [] }, of];
      families.set(of, current);
    } else if (word === "TYPE") {
      if (of !== name || current.samples.length > 0 || !/^(counter|gauge|histogram)$/.test(rest)) throw new Error(line);
      current.type = rest;
    } else {
      const [, sample = "", labelText = "", value = ""] =
        /^([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\n"])*",?)*)\})? (-?[\d.]+(?:e[+-]?\d+)?|\+Inf|NaN)$/.exec(line) ??
        [];
      if (seen.has(`${sample}{${labelText}}`)) throw new Error(`${line} comes twice`);
      seen.add(`${sample}{${labelText}}`);
      const suffix = current.type === "histogram" ? sample.replace(name, "") : sample === name ? "" : "no";
      if (!["", "_bucket", "_sum", "_count"].includes(suffix)) throw new Error(`not of ${name}: ${line}`);
      const labels = [...labelText.matchAll(/([a-z_]+)="((?:[^"\\]|\\.)*)"/g)].map(([, key = "", text_ = ""]) => [
        key,
        text_,
      ]);
      current.samples.push({ name: sample, labels: Object.fromEntries(labels), value: Number(value) });
    }
  }
  return families;
}

test("the metrics are well-formed, and say what was answered, how fast, and what the engine does", async () => {
  let now = 1e12;
  const { get, post, engine } = testApp({ clock: () => now, apiKeys: [API_KEY] });
  const key = { Authorization: `Bearer ${API_KEY}` };
  engine.reply = function* ({ onStart }) {
    now += 50;
    onStart?.();
    now += 150;
    yield "a";
    now += 2000;
    yield "b";
  };
  const asked = { model: "base", prompt: "a" };
  expect((await post("/v1/completions", asked, key)).status).toBe(200);
  expect(eventsOf(await (await post("/v1/completions", { ...asked, stream: true }, key)).text()).isDone).toBe(true);
  await post("/v1/completions", { ...asked, temperature: -1 }, key);
  await get('/v1/models/"\\\n{x="y"}', key);
  await get('/"} 1\nevil 1', key);
  const response = await get("/metrics", key);
  expect(response.headers.get("content-type")).toBe("text/plain; version=0.0.4; charset=utf-8");
  const families = parsed(await response.text());
  for (const [name, { help, type }] of families) {
    expect([help, type], name).not.toContain(undefined);
    expect(name.endsWith("_total"), name).toBe(type === "counter");
  }
  const valuesOf = (name: string): unknown[] =>
    (families.get(name)?.samples ?? []).map(({ labels, value }) => ({ ...labels, value }));
  expect(valuesOf("lowrank_http_responses_total")).toEqual([
    { route: "/v1/completions", method: "POST", status: "200", value: 2 },
    { route: "/v1/completions", method: "POST", status: "400", value: 1 },
    { route: "/v1/models/{id}", method: "GET", status: "404", value: 1 },
    { route: "other", method: "GET", status: "404", value: 1 },
  ]);
  const histogram = (name: string): unknown =>
    Object.fromEntries(
      (families.get(name)?.samples ?? []).map((one) => [
        `${one.name.replace(name, "")}${one.labels.le ?? ""}`,
        one.value,
      ]),
    );
  expect(histogram("lowrank_first_text_seconds")).toMatchObject({
    ...{ "_bucket0.1": 0, "_bucket0.3": 2, _bucket300: 2, "_bucket+Inf": 2, _sum: 0.4, _count: 2 },
  });
  expect(histogram("lowrank_queue_seconds")).toMatchObject({
    ...{ "_bucket0.03": 0, "_bucket0.1": 2, "_bucket+Inf": 2, _sum: 0.1, _count: 2 },
  });
  expect(histogram("lowrank_between_tokens_seconds")).toMatchObject({
    ...{ _bucket1: 0, _bucket3: 2, "_bucket+Inf": 2, _sum: 4, _count: 2 },
  });
  expect(histogram("lowrank_answer_seconds")).toMatchObject({
    ...{ _bucket1: 0, _bucket3: 2, "_bucket+Inf": 2, _sum: 4.4, _count: 2 },
  });
  const engineSays = [...families].flatMap(([name, { samples }]) =>
    samples.length === 1 && name !== "lowrank_answers_abandoned_total"
      ? [[name.replace("lowrank_", ""), samples[0]?.value]]
      : [],
  );
  expect(Object.fromEntries(engineSays)).toEqual({
    ...{ sequences_running: 0, sequences_waiting: 0, kv_pages_used: 2, kv_pages: 8, adapters_resident: 1 },
    ...{ adapter_loads_total: 3, adapter_evictions_total: 1, prompt_tokens_total: 40, cached_prompt_tokens_total: 8 },
    ...{ generated_tokens_total: 99, steps_total: 50, preemptions_total: 2, gpu_bytes: 4096 },
  });
});

test("before there was a response the metrics are well-formed too", async () => {
  expect(parsed(await (await testApp().get("/metrics")).text()).get("lowrank_http_responses_total")?.samples).toEqual(
    [],
  );
});
