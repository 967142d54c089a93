/** EVA: an adapter that begins with the directions in which its inputs vary. */
import { matmul } from "../autograd/basic-ops.ts";
import { copyTo } from "../kernels/copy-rows.ts";
import { gatherRows } from "../kernels/gather-rows.ts";
import type { Linear } from "../nn/linear.ts";
import { ShapeError } from "../tensor/errors.ts";
import { matrix } from "../tensor/linalg.ts";
import { empty, readAll, type Tensor, tensor } from "../tensor/tensor.ts";
import type { LoraAdapter } from "./adapter.ts";
import { attachLora } from "./attach.ts";
import { type CalibrationBatch, demandBatches, inRuns } from "./calibration.ts";
import { checkConfig, type LoraConfig, modulesOf, settingsOf, withHeads } from "./config.ts";
import { planOperator } from "./device-operator.ts";
import { addRows, explained, type Pca } from "./incremental-pca.ts";
import { rowsOf } from "./init-factors.ts";
import type { HasLinears } from "./parts.ts";

/** By PEFT's names and defaults (`EvaConfig`). */
export interface EvaOptions {
  /** A module gets at most so many times its rank: 1 leaves all ranks as they are. 2 unless given. */
  readonly rho?: number;
  /** A direction has settled when one more batch turns it by less than this cosine; 0.99 unless given. */
  readonly tau?: number;
  /** Multiply alpha by new rank / rank, so that s stays; true unless given. */
  readonly adjustScalingFactors?: boolean;
  /**
   * Passes over batches, again and again from the first, after which directions are taken as they are. Two whose shares of the variance are
   * nearly equal may turn within their plane for long. 50, or one for each batch, unless given.
   */
  readonly maxPasses?: number;
  readonly seed?: number;
  /** Ends it by throwing the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

/** Modules that read the same input. */
interface Source {
  readonly names: readonly string[];
  /** The one whose input is looked at. */
  readonly layer: Linear;
  /** Components that are followed: of the rank that each of them may get. */
  readonly most: number;
  pca: Pca | undefined;
  settled: readonly boolean[];
}

/**
 * EVA (arXiv:2410.07170) as in PEFT: a fresh adapter whose A are the first right-singular vectors of what each target reads, by incremental PCA
 * over the batches until they settle, and whose B are zero. The ranks are dealt out anew: of all directions of all modules those that
 * explain the largest share of their module's variance, as many as the ranks add up to. `rankPattern` and `alphaPattern` of the adapter's
 * settings say what came of it; a module that got none is no target any more.
 *
 * Throws ShapeError for options out of range, no data, batches with fewer positions to learn than a module may get directions, a
 * module with fewer inputs than that, and layers with an adapter.
 */
export async function attachEva(
  model: HasLinears,
  settings: LoraConfig,
  batches: readonly CalibrationBatch[],
  options: EvaOptions = {},
): Promise<LoraAdapter> {
  const config = withHeads(settings, model);
  checkConfig(config);
  const {
    rho = 2,
    tau = 0.99,
    maxPasses = Math.max(50, batches.length),
    adjustScalingFactors = true,
    seed = 0,
    signal,
  } = options;
  if (!(rho >= 1 && Number.isFinite(rho))) throw new ShapeError(`eva: rho must be a number of at least 1, got ${rho}`);
  if (!(tau >= 0 && tau <= 1)) throw new ShapeError(`eva: tau must be from 0 to 1, got ${tau}`);
  if (!Number.isInteger(maxPasses) || maxPasses < batches.length)
    throw new ShapeError(
      `eva: maxPasses must be a whole number of at least ${batches.length}, one for each batch, got ${maxPasses}`,
    );
  demandBatches("eva", batches);
  const modules = modulesOf(config, [...model.linears.keys()]);
  const sources = sourcesOf(model, config, modules, rho);
  check(model, sources, batches);
  const ranks = await settle(sources, config, batches, { tau, maxPasses, seed, signal });
  const adapter = attachLora(model, redistributed(config, modules, ranks, adjustScalingFactors), seed);
  const starts = [...adapter.pairs].map(([name, { A, B }]) => {
    const pca = sources.find(({ names }) => names.includes(name))?.pca as Pca;
    const first = rowsOf(pca.components, A.shape[0] ?? 0, (i) => i);
    return [name, { A: Float32Array.from(first.data), B: new Float32Array(B.size) }] as const;
  });
  adapter.start(new Map(starts), false);
  return adapter;
}

/** The modules by input, in their order. */
function sourcesOf(model: HasLinears, config: LoraConfig, modules: readonly string[], rho: number): Source[] {
  const { groups = [] } = model;
  const groupOf = (name: string): readonly string[] =>
    modules.filter((other) => other === name || groups.some((group) => group.includes(name) && group.includes(other)));
  return modules.flatMap((name) => {
    const [names, layer] = [groupOf(name), model.linears.get(name)];
    if (names[0] !== name || !layer) return [];
    const most = Math.max(...names.map((member) => Math.round(settingsOf(config, member).r * rho)));
    return [{ names, layer, most, pca: undefined, settled: [] }];
  });
}

function check(model: HasLinears, sources: readonly Source[], batches: readonly CalibrationBatch[]): void {
  const positions = Math.max(...batches.map((batch) => batch.positions.length));
  for (const { names, layer, most } of sources) {
    const taken = names.find((name) => model.linears.get(name)?.adapters);
    if (taken !== undefined)
      throw new ShapeError(`eva: layers must be without an adapter, got one on ${taken}. Detach it`);
    const K = layer.weight.shape[1] ?? 0;
    if (most > K)
      throw new ShapeError(
        `eva: rho times the rank must be at most ${K}, the inputs of ${names[0]}, got ${most}. Use a smaller rank or rho`,
      );
    if (most > positions)
      throw new ShapeError(
        `eva: a batch must have at least ${most} tokens to learn, rho times the rank, got ${positions}. Use larger batches, a smaller rank or rho`,
      );
  }
}

/** Goes over the batches until every direction that a module gets has settled. Gives the rank of each module. */
async function settle(
  sources: readonly Source[],
  config: LoraConfig,
  batches: readonly CalibrationBatch[],
  {
    tau,
    maxPasses,
    seed,
    signal,
  }: Required<Pick<EvaOptions, "tau" | "maxPasses" | "seed">> & Pick<EvaOptions, "signal">,
): Promise<Map<string, number>> {
  let ranks = new Map(sources.flatMap(({ names, most }) => names.map((name) => [name, most] as const)));
  const isOpen = ({ names, settled, pca }: Source): boolean =>
    !pca || Array.from({ length: ranks.get(names[0] ?? "") ?? 0 }).some((_, i) => !settled[i]);
  for (let pass = 0; pass < maxPasses; pass++) {
    const batch = batches[pass % batches.length] as CalibrationBatch;
    const open = sources.filter((source) => isOpen(source) && source.most <= batch.positions.length);
    for (const run of runsOf(open, batch)) {
      signal?.throwIfAborted();
      await look(run, batch, tau, seed);
    }
    if (sources.every(({ pca }) => pca)) ranks = dealt(sources, config);
    if (!sources.some(isOpen)) return ranks;
  }
  return ranks;
}

/** One more batch of what the sources read. */
async function look(sources: readonly Source[], batch: CalibrationBatch, tau: number, seed: number): Promise<void> {
  const { kept, free } = record(sources, batch);
  const inputs = await readAll(kept).finally(free);
  for (const [i, source] of sources.entries()) {
    const K = source.layer.weight.shape[1] ?? 0;
    const rows = matrix(batch.positions.length, K, inputs[i] ?? []);
    const before = source.pca;
    source.pca = await addRows(source.layer.weight.gpu, before, rows, source.most, seed);
    if (before) source.settled = cosines(before, source.pca).map((cosine) => cosine >= tau);
  }
}

/** What each source reads at the batch's positions, [n,K], on the device. An adapter that only looks is on its layer meanwhile. */
function record(
  sources: readonly Source[],
  batch: CalibrationBatch,
): { readonly kept: readonly Tensor[]; free(): void } {
  const { gpu } = (sources[0] as Source).layer.weight;
  const { positions } = batch;
  const at = tensor(gpu, positions, [positions.length]);
  const kept = sources.map(({ layer }) => empty(gpu, [positions.length, layer.weight.shape[1] ?? 0], "eva"));
  const workspace: GPUBuffer[] = [];
  const free = (): void => gpu.release(at, ...kept, ...workspace.map((buffer) => ({ buffer })));
  try {
    sources.forEach(({ layer }, i) => {
      const keep = (x: Tensor): void => copyTo(gatherRows(x, at), kept[i] as Tensor);
      layer.adapters = [
        {
          apply: (x, W, bias) => {
            keep(x);
            return matmul(x, W, "nt", bias);
          },
          add: (y, x) => {
            keep(x);
            return y;
          },
        },
      ];
    });
    const plan = gpu.trace(() => void batch.forward(), workspace);
    plan.run();
    plan.destroy();
    return { kept, free };
  } catch (error) {
    free();
    throw error;
  } finally {
    for (const { layer } of sources) layer.adapters = undefined;
  }
}

/** Makes and frees on a dry Gpu what `attachEva` needs there: how a plan knows. */
export function planEva(model: HasLinears, config: LoraConfig, batches: readonly CalibrationBatch[], rho = 2): void {
  const sources = sourcesOf(model, config, modulesOf(config, [...model.linears.keys()]), rho);
  for (const batch of batches)
    for (const run of runsOf(sources, batch)) {
      record(run, batch).free();
      for (const { layer, most } of run) {
        const { gpu, shape } = layer.weight;
        const X = empty(gpu, [most + batch.positions.length + 1, shape[1] ?? 0], "eva");
        planOperator(X, 2 * most);
        gpu.release(X);
      }
    }
}

const runsOf = (sources: readonly Source[], { positions }: CalibrationBatch): Source[][] =>
  inRuns(sources, ({ layer }) => 4 * positions.length * (layer.weight.shape[1] ?? 0));

/** cos of the angle between each component and what it was. */
const cosines = ({ components: a }: Pca, { components: b }: Pca): number[] =>
  Array.from({ length: b.rows }, (_, i) => {
    const row = a.data.subarray(i * a.columns, (i + 1) * a.columns);
    return row.reduce((sum, x, k) => sum + x * (b.data[i * b.columns + k] ?? 0), 0);
  });

/**
 * The ranks: as many of all directions as the ranks of the settings add up to, by the share of variance they explain. Where modules read
 * the same, their directions are alike; of such equals the first module comes first, and gets the most.
 */
function dealt(sources: readonly Source[], config: LoraConfig): Map<string, number> {
  const ordered = [
    ...sources.flatMap(({ names }) => names.slice(0, 1)),
    ...sources.flatMap(({ names }) => names.slice(1)),
  ];
  const shares = new Map(
    sources.flatMap(({ names, pca }) => names.map((name) => [name, pca ? explained(pca) : []] as const)),
  );
  const budget = ordered.reduce((sum, name) => sum + settingsOf(config, name).r, 0);
  const all = ordered.flatMap((name) => (shares.get(name) ?? []).map((share) => ({ name, share })));
  const ranks = new Map(ordered.map((name) => [name, 0]));
  for (const { name } of all.sort((a, b) => b.share - a.share).slice(0, budget))
    ranks.set(name, (ranks.get(name) ?? 0) + 1);
  for (const { names } of sources) {
    const sorted = names.map((name) => ranks.get(name) ?? 0).sort((a, b) => b - a);
    names.forEach((name, i) => void ranks.set(name, sorted[i] ?? 0));
  }
  return ranks;
}

/** The settings with these ranks. */
function redistributed(
  config: LoraConfig,
  modules: readonly string[],
  ranks: ReadonlyMap<string, number>,
  adjusts: boolean,
): LoraConfig {
  const kept = modules.filter((name) => ranks.get(name));
  const found = kept.map((name) => {
    const { r, alpha } = settingsOf(config, name);
    const rank = ranks.get(name) ?? 0;
    return { name, rank, alpha: adjusts ? (alpha * rank) / r : alpha };
  });
  return {
    ...config,
    ...(kept.length < modules.length && { targetModules: kept }),
    rankPattern: Object.fromEntries(found.flatMap(({ name, rank }) => (rank === config.r ? [] : [[name, rank]]))),
    alphaPattern: Object.fromEntries(
      found.flatMap(({ name, alpha }) => (alpha === config.alpha ? [] : [[name, alpha]])),
    ),
  };
}
