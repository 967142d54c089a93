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
  | { readonly op: "row-sum"; readonly x: HostMatrix };

/** A piece of work whose operands are on the peer's device. */
export interface PeerCase {
  /** Enqueues one run. Not called again before a promise it returned has settled. */
  readonly run: () => void | Promise<void>;
  /** Settles when the device has done all that was enqueued. */
  readonly finish: () => Promise<void>;
  /** The results of the last run, by name. */
  readonly read: () => Promise<Readonly<Record<string, Float32Array>>>;
  readonly dispose: () => void | Promise<void>;
}

export interface Peer {
  readonly name: string;
  readonly version: string;
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
