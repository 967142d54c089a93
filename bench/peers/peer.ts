/**
 * What a peer is to the harness: another WebGPU library that does the same work on the same adapter.
 *
 * Operands are on the device before anything is timed, results stay there, and a run lets go of what the run before it made.
 */

/** Row-major f32 on the host. */
export interface HostMatrix {
  readonly rows: number;
  readonly columns: number;
  readonly values: Float32Array<ArrayBuffer>;
}

interface Layer {
  readonly x: HostMatrix; // [M,K]
  readonly W: HostMatrix; // [N,K]
  readonly A: HostMatrix; // [r,K]
  readonly B: HostMatrix; // [N,r]
  readonly scale: number;
}

/** What trains a linear layer; with a magnitude it is DoRA's. */
export interface LlamaPair {
  readonly A: HostMatrix;
  readonly B: HostMatrix;
  readonly magnitude?: DoraMagnitude;
}

/** m, a row, and the norms that it is divided by, to which no gradient goes. */
export interface DoraMagnitude {
  readonly m: HostMatrix;
  readonly norms: Float64Array;
}

/**
 * One training step of LoRA on a Llama of which everything else is frozen, from given A and B and with moments that are zero: the mean
 * cross-entropy of the next token, its gradients by A and B, their global norm, and AdamW without decay. Causal, one row of T tokens,
 * grouped-query attention, RoPE on the pairs (i, i + D/2), the embedding as output projection.
 *
 * Results: "loss", "grad norm", "adapter" (every A and B after the step, one behind the other), and for each of `gradients` what its
 * name says, divided by its unit.
 */
export interface LlamaStep {
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly rmsNormEps: number;
  /** By Hugging Face name; a norm's is a row. */
  readonly weights: ReadonlyMap<string, HostMatrix>;
  /** A [r,K] and B [N,r] of every linear layer, by the name of its module. */
  readonly adapter: ReadonlyMap<string, LlamaPair>;
  /** What B·A is multiplied by. */
  readonly scale: number;
  /** [T] */
  readonly ids: Int32Array<ArrayBuffer>;
  /** [T, D/2] */
  readonly cos: HostMatrix;
  readonly sin: HostMatrix;
  readonly adamw: {
    readonly learningRate: number;
    readonly beta1: number;
    readonly beta2: number;
    readonly eps: number;
  };
  /** "A of …" or "B of …" and a module's name, each with its unit: the root mean square of the gradient, so that errors are seen. */
  readonly gradients: ReadonlyMap<string, number>;
}

/** Every A and B with its name, in the order of "adapter". */
export const parametersOf = ({ adapter }: Pick<LlamaStep, "adapter">): [name: string, HostMatrix][] =>
  [...adapter].flatMap(([module, { A, B }]) => [
    [`A of ${module}`, A],
    [`B of ${module}`, B],
  ]);

/** The results of a step from what was computed: every A and B after it in the order of `parametersOf`, and the gradients by name. */
export function llamaResults(
  { gradients }: LlamaStep,
  loss: Float32Array,
  norm: Float32Array,
  parameters: readonly Float32Array[],
  gradientOf: ReadonlyMap<string, Float32Array>,
): Record<string, Float32Array> {
  const adapter = new Float32Array(parameters.reduce((size, { length }) => size + length, 0));
  let at = 0;
  for (const values of parameters) {
    adapter.set(values, at);
    at += values.length;
  }
  const named = [...gradients].map(([name, unit]) => [name, gradientOf.get(name)?.map((g) => g / unit)] as const);
  return { loss, "grad norm": norm, adapter, ...Object.fromEntries(named.flatMap(([n, g]) => (g ? [[n, g]] : []))) };
}

/** One piece of work, with the names of its results. Letters and layouts are those of the engine. */
export type PeerWork =
  /** y = op(x)·op(w): "nn", "nt" or "tn". */
  | { readonly op: "matmul"; readonly layout: "nn" | "nt" | "tn"; readonly x: HostMatrix; readonly w: HostMatrix }
  /** y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ. */
  | ({ readonly op: "lora-forward" } & Layer)
  /** The same y and, weighted by dy, its gradients dx, dA and dB; W is frozen. */
  | ({ readonly op: "lora-step"; readonly dy: HostMatrix } & Layer)
  /** y = x + z. */
  | { readonly op: "add"; readonly x: HostMatrix; readonly z: HostMatrix }
  /** y [rows], the sum of each row of x. */
  | { readonly op: "row-sum"; readonly x: HostMatrix }
  | ({ readonly op: "llama-step" } & LlamaStep);

/** A piece of work whose operands are on the peer's device. */
export interface PeerCase {
  /** Enqueues one run. Not called again before a promise it returned has settled. */
  readonly run: () => void | Promise<void>;
  /** Settles when the device has done all that was enqueued. */
  readonly finish: () => Promise<void>;
  /** The results of the last run, by name. */
  readonly read: () => Promise<Readonly<Record<string, Float32Array>>>;
  /**
   * Bytes of buffers on the device at most, from `prepare` to the first `read`, beyond what the peer held before; undefined where its
   * device is not known.
   */
  readonly peakBytes?: () => number | undefined;
  readonly dispose: () => void | Promise<void>;
}

export interface Peer {
  readonly name: string;
  readonly version: string;
  /** Where it computes, so that its memory can be counted. */
  readonly device?: () => GPUDevice;
  /** Rejects, saying why, where the peer cannot do this work. */
  readonly prepare: (work: PeerWork) => Promise<PeerCase>;
}

/** How to get a peer. `open` rejects, saying why, where it cannot be had. */
export interface PeerSource {
  readonly name: string;
  readonly open: (host: PeerHost) => Promise<Peer>;
}

/** What a peer may ask of whoever opens it. `navigator.gpu` and the globals of WebGPU are there by then. */
export interface PeerHost {
  /** A file by its path from the root of the repository. */
  readonly readRepoFile: (path: string) => Promise<Uint8Array<ArrayBuffer>>;
}

/** The directory of the peers' packages, and the version of one of them. */
export const PEER_MODULES = "bench/peers/node_modules";

/** What to say when the import of a peer's packages fails. Imports in a `try` need not resolve for a bundler either. */
export const importError = (cause: unknown): Error =>
  new Error(`its packages could not be imported: ${String(cause)}. Run: npm ci --prefix bench/peers`);

export async function packageVersion({ readRepoFile }: PeerHost, name: string): Promise<string> {
  const json = await readRepoFile(`${PEER_MODULES}/${name}/package.json`);
  return (JSON.parse(new TextDecoder().decode(json)) as { version: string }).version;
}
