/** Prometheus' text format (exposition format 0.0.4). */
import type { EngineStats } from "../engine-types.ts";

type Labels = Readonly<Record<string, string | number>>;

interface Sample {
  readonly suffix?: string;
  readonly labels?: Labels;
  readonly value: number;
}

const labelsText = (labels: Labels = {}): string => {
  const pairs = Object.entries(labels).map(([name, value]) => `${name}="${escaped(String(value))}"`);
  return pairs.length > 0 ? `{${pairs.join(",")}}` : "";
};
const escaped = (text: string): string => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll('"', '\\"');

function family(name: string, kind: string, help: string, samples: readonly Sample[]): string {
  const lines = samples.map(({ suffix = "", labels, value }) => `${name}${suffix}${labelsText(labels)} ${value}`);
  return [`# HELP ${name} ${help}`, `# TYPE ${name} ${kind}`, ...lines].join("\n");
}

class Histogram {
  readonly #bounds: readonly number[];
  readonly #counts: number[];
  #sum = 0;

  constructor(bounds: readonly number[]) {
    this.#bounds = bounds;
    this.#counts = new Array(bounds.length + 1).fill(0) as number[];
  }

  observe(value: number): void {
    const at = this.#bounds.findIndex((bound) => value <= bound);
    const bucket = at < 0 ? this.#bounds.length : at;
    this.#counts[bucket] = (this.#counts[bucket] ?? 0) + 1;
    this.#sum += value;
  }

  get samples(): Sample[] {
    let total = 0;
    const buckets = this.#counts.map((count, i) => {
      total += count;
      return { suffix: "_bucket", labels: { le: String(this.#bounds[i] ?? "+Inf") }, value: total };
    });
    return [...buckets, { suffix: "_sum", value: this.#sum }, { suffix: "_count", value: total }];
  }
}

const SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300];

const GAUGES: readonly (readonly [keyof EngineStats, name: string, help: string])[] = [
  ["running", "lowrank_sequences_running", "Sequences that are being generated."],
  ["waiting", "lowrank_sequences_waiting", "Requests that wait for a place."],
  ["kvPagesUsed", "lowrank_kv_pages_used", "Pages of keys and values that are in use."],
  ["kvPages", "lowrank_kv_pages", "Pages of keys and values that there are."],
  ["gpuBytes", "lowrank_gpu_bytes", "Bytes on the device that are in use, without what traced steps keep."],
  ["adaptersResident", "lowrank_adapters_resident", "Adapters whose weights are on the device."],
];
const COUNTERS: readonly (readonly [keyof EngineStats, name: string, help: string])[] = [
  ["adapterLoads", "lowrank_adapter_loads_total", "Times that an adapter was brought to the device."],
  ["adapterEvictions", "lowrank_adapter_evictions_total", "Times that an adapter made place for another."],
  ["promptTokens", "lowrank_prompt_tokens_total", "Tokens of prompts."],
  ["cachedPromptTokens", "lowrank_cached_prompt_tokens_total", "Tokens of prompts that needed no computing."],
  ["generatedTokens", "lowrank_generated_tokens_total", "Tokens that were generated."],
  ["steps", "lowrank_steps_total", "Passes of the model."],
  ["preemptions", "lowrank_preemptions_total", "Times that a request went back into the queue for want of pages."],
];

export class Metrics {
  readonly #responses = new Map<string, { readonly labels: Labels; value: number }>();
  /** Seconds until the first text of an answer. */
  readonly firstText: Histogram = new Histogram(SECONDS);
  /** Seconds until a choice leaves the queue. */
  readonly queue: Histogram = new Histogram(SECONDS);
  /** Seconds between two tokens of a choice, as its reader takes them. */
  readonly betweenTokens: Histogram = new Histogram(SECONDS);
  /** Seconds until an answer's end. */
  readonly whole: Histogram = new Histogram(SECONDS);
  /** Answers that nobody waited for. */
  abandoned = 0;

  /** The labels come from few values, never from what a client wrote. */
  countResponse(route: string, method: string, status: number): void {
    const key = `${route} ${method} ${status}`;
    const response = this.#responses.get(key) ?? { labels: { route, method, status }, value: 0 };
    response.value++;
    this.#responses.set(key, response);
  }

  text(stats: EngineStats): string {
    const families = [
      family("lowrank_http_responses_total", "counter", "Responses by route, method and status.", [
        ...this.#responses.values(),
      ]),
      family("lowrank_answers_abandoned_total", "counter", "Answers that the client went away from.", [
        { value: this.abandoned },
      ]),
      family("lowrank_first_text_seconds", "histogram", "Time until an answer's first text.", this.firstText.samples),
      family("lowrank_queue_seconds", "histogram", "Time until a choice leaves the queue.", this.queue.samples),
      family(
        "lowrank_between_tokens_seconds",
        "histogram",
        "Time between two tokens of a choice, as its reader takes them.",
        this.betweenTokens.samples,
      ),
      family("lowrank_answer_seconds", "histogram", "Time until an answer's end.", this.whole.samples),
      ...GAUGES.map(([key, name, help]) => family(name, "gauge", help, [{ value: stats[key] }])),
      ...COUNTERS.map(([key, name, help]) => family(name, "counter", help, [{ value: stats[key] }])),
    ];
    return `${families.join("\n")}\n`;
  }
}
