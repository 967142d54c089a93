/** `lowrank`: the engine. Runs in Chrome, Deno and Node; depends on nothing. Every public name is listed here, but for the differentiable ops. */

export * from "./autograd/basic-ops.ts";
export { adding, backward, type Gradients, once, recompute, record } from "./autograd/engine.ts";
export * from "./autograd/model-ops.ts";
export {
  type CheckpointContent,
  changedSettings,
  checkpointContent,
  type RunNotes,
  type RunSettings,
  readCheckpoint,
  type SavedCheckpoint,
  startAsIn,
} from "./checkpoint-content.ts";
export { GpuError } from "./gpu/errors.ts";
export { type Counters, type Dispatch, Gpu, type HasBuffer, type OpenGpuOptions, openGpu } from "./gpu/gpu.ts";
export {
  defineKernel,
  definePart,
  type Kernel,
  mapUniform,
  type Part,
  type Tuned,
  type Uniform,
} from "./gpu/kernel.ts";
export type { Plan } from "./gpu/plan.ts";
export type { Candidate, Question, Trial, Tuner, TuneStore, Tuning } from "./gpu/tuner.ts";
export {
  type ByteSource,
  blobSource,
  type Directory,
  httpDirectory,
  memoryDirectory,
  memorySource,
} from "./io/bytes.ts";
export { FormatError } from "./io/errors.ts";
export {
  encodeSafetensors,
  openSafetensors,
  type SafetensorsFile,
  type TensorInfo,
  type TensorToWrite,
} from "./io/safetensors.ts";
export type { DropoutKey } from "./kernels/dropout.ts";
export type { CrossEntropyOptions, Head } from "./kernels/linear-cross-entropy.ts";
export type { Layout } from "./kernels/matmul.ts";
export { type PackOptions, packMatrix } from "./kernels/pack.ts";
export { unpackMatrix } from "./kernels/unpack.ts";
export { LoraAdapter } from "./lora/adapter.ts";
export { attachLora } from "./lora/attach.ts";
export type { CalibrationBatch } from "./lora/calibration.ts";
export type { LoraConfig } from "./lora/config.ts";
export { doraLinear, type Magnitude, rowSquares } from "./lora/dora-linear.ts";
export { initLora, type LoraInit } from "./lora/init.ts";
export { attachEva, type EvaOptions } from "./lora/init-eva.ts";
export { initLoftq, type LoftqOptions } from "./lora/init-loftq.ts";
export { initLoraGa, type LoraGaOptions } from "./lora/init-lora-ga.ts";
export { type LoraFa, loraFa } from "./lora/lora-fa.ts";
export { loraLinear } from "./lora/lora-linear.ts";
export type {
  HasLinears,
  LoraPair,
  LoraParts,
  SavedLayer,
  SavedParts,
  TablePair,
  TableParts,
  TokenRows,
} from "./lora/parts.ts";
export { type AdapterFiles, type LoadPeftOptions, loadPeft, savePeft } from "./lora/peft.ts";
export { SharedBase } from "./lora/shared-base.ts";
export { matchModules, type TargetModules } from "./lora/target-modules.ts";
export { BertClassifier, type BertConfig } from "./models/bert.ts";
export { CausalModel, type HiddenOptions, type KvCache, type Packing } from "./models/causal.ts";
export { isClassifier, type ModelConfig, readClassifierConfig, readConfig } from "./models/config.ts";
export type { CausalConfig, DecoderConfig } from "./models/decoder-config.ts";
export { emptyModel, type LoadOptions, loadModel, makeModel, openLinears, weightShapes } from "./models/load.ts";
export { type ClassifierOptions, loadClassifier } from "./models/load-classifier.ts";
export type { WeightFormat, WeightMap } from "./models/weights.ts";
export { type Linear, type LinearAdapter, linear } from "./nn/linear.ts";
export type { Module } from "./nn/module.ts";
export { inverseFrequencies, type RopeSettings, ropeTables } from "./nn/rope.ts";
export type { EmbeddingNoise, HeadUpdate, Table, TableUpdate } from "./nn/table.ts";
export { type GenerateOptions, generate, generateTokens } from "./serve/generate.ts";
export type { SampledToken, SamplingOptions, ScoredToken, TokenConstraint } from "./serve/sampling.ts";
export { ShapeError } from "./tensor/errors.ts";
export { isPacked, type PackedFormat, type PackedMatrix } from "./tensor/packed.ts";
export { Random } from "./tensor/random.ts";
export { type DType, empty, read, readAll, type Shape, slice, Tensor, tensor, view } from "./tensor/tensor.ts";
export { AdamW, type AdamWSettings, type AdamWState } from "./train/adamw.ts";
export { type Batch, batchIndices, collate } from "./train/batches.ts";
export { type CalibrationOptions, calibrationBatches } from "./train/calibration.ts";
export { decodeState, encodeState, type TrainingState } from "./train/checkpoint.ts";
export {
  type ClassificationLimits,
  type ClassificationStats,
  readClassificationRows,
} from "./train/classification-rows.ts";
export {
  type ClassificationBatch,
  type ClassificationRow,
  type Classifier,
  type ClassifierLimits,
  type ClassifierOutputs,
  classificationLoss,
  classificationTask,
  classifierLogits,
  collateClassification,
  evaluateClassifier,
  type WeightedLoss,
} from "./train/classify.ts";
export { splitRows } from "./train/data/split.ts";
export {
  type DataLimits,
  type DataStats,
  IGNORED,
  type LossOn,
  PAIR_FORMS,
  type PreferencePair,
  pairsOf,
  type Row,
  RowMaker,
  type RowOptions,
  readPairs,
  readRows,
  rowStream,
  rowsOf,
} from "./train/data.ts";
export {
  findLearningRate,
  findTaskLearningRate,
  type RatePoint,
  type RateSweep,
  type RateSweepOptions,
  type TaskRateSweepOptions,
} from "./train/find-learning-rate.ts";
export {
  type LaneSettings,
  LaneStep,
  type LaneStepOptions,
  type LaneWork,
  type SharesBase,
} from "./train/lane-step.ts";
export {
  bestPrecision,
  type Curvature,
  curvatureOf,
  drawOffset,
  type Gradient,
  logEvidence,
  outputCovariance,
} from "./train/laplace.ts";
export { type ClassPredictiveOptions, classifierCurvature, predictClasses } from "./train/laplace-classify.ts";
export {
  languageCurvature,
  predictTokens,
  type TokenModel,
  type TokenPredictions,
  type TokenPredictiveOptions,
} from "./train/laplace-language.ts";
export {
  batchInputs,
  batchLoss,
  type EvaluateOptions,
  type Evaluation,
  evaluate,
  type Inputs,
  type LanguageModel,
  type LossSettings,
  writeInputs,
} from "./train/loss.ts";
export {
  type CalibrationMetrics,
  type ClassificationMetrics,
  calibrationMetrics,
  classificationMetrics,
  type Prediction,
  predictionOf,
} from "./train/metrics.ts";
export { packRows, paddingShare } from "./train/packing.ts";
export { type MemoryPlan, type PlanOptions, planTraining } from "./train/plan.ts";
export {
  evaluatePreferences,
  type PreferenceBatch,
  type PreferenceEvaluation,
  type PreferenceRow,
  type PreferenceSettings,
  preferenceTask,
  withReference,
} from "./train/preference.ts";
export {
  byKernel,
  chromeTrace,
  type KernelProfile,
  type ProfiledDispatch,
  profileTable,
} from "./train/profile.ts";
export type { Rows } from "./train/row-source.ts";
export { type Schedule, scheduleFactor } from "./train/schedule.ts";
export {
  type Dimension,
  gridPoints,
  randomPoint,
  type SearchPoint,
  type SearchSpace,
  type SearchTrial,
  type Setting,
  suggestPoint,
} from "./train/search.ts";
export {
  type HasTrainingMode,
  TrainingStep,
  type TrainingStepOptions,
  type TrainingStepState,
} from "./train/step.ts";
export type { StepMetrics } from "./train/step-metrics.ts";
export type { StepResult } from "./train/step-ring.ts";
export {
  type SharedRuns,
  type SharedTrial,
  type SweepOptions,
  type SweepStrategy,
  type SweepTrial,
  sweep,
} from "./train/sweep.ts";
export {
  type LanguageSettings,
  type Loaded,
  languageTask,
  type RowTask,
  type Task,
  type TrainingMode,
} from "./train/task.ts";
export { type LaneEvent, type LaneOptions, type TogetherOptions, trainTogether } from "./train/together.ts";
export { type TrainOptions, type TrainTaskOptions, train, trainTask } from "./train/trainer.ts";
export type { BestSoFar, Evaluated, Validation } from "./train/validation.ts";
