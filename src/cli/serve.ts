import { existsSync } from "node:fs";
import { networkInterfaces, hostname as thisHost } from "node:os";
import { basename, resolve } from "node:path";
import { Command, Option } from "commander";
import { directoriesIn, diskDirectory } from "../io/files.ts";
import { createApp } from "../server.ts";
import { ShapeError } from "../tensor/errors.ts";
import { loadTokenizer } from "../tokenizer.ts";
import { adaptersOf, type CacheArguments, cacheOptions, namedAdaptersOption, openEngine } from "./engine.ts";
import { modelOption, quantizeOption, revisionOption, templateOption, timeOption, whole } from "./options.ts";
import { located } from "./places.ts";
import { configOption } from "./run-config.ts";
import { listen } from "./serve-node.ts";
import { openTemplate, say, withGpu } from "./session.ts";
import { version } from "./version.ts";

interface ServeArguments extends CacheArguments {
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly servedModelName?: string;
  readonly chatTemplate?: string;
  readonly adapter?: readonly string[];
  readonly adapterDir?: string;
  readonly allowRuntimeLora?: boolean;
  readonly host: string;
  readonly port: number;
  readonly allowedHost?: readonly string[];
  readonly corsOrigin?: readonly string[];
  readonly apiKey?: readonly string[];
  readonly adminKey?: string;
  readonly maxRows: number;
  readonly maxStepTokens: number;
  readonly cacheTokens?: number;
  readonly maxLoras: number;
  readonly maxLoraRank?: number;
  readonly maxQueue: number;
  readonly maxConcurrent: number;
  readonly maxConnections: number;
  readonly maxTokens?: number;
  readonly shutdownTimeout: number;
  readonly quiet?: boolean;
}

const EXAMPLES = `
Examples:
  $ lowrank serve --model models/base --adapter pirate=adapters/pirate
  $ curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
      -d '{"model": "pirate", "prompt": "Once upon a time", "max_tokens": 40}'
  $ LOWRANK_API_KEY=… lowrank serve --model models/base --host 0.0.0.0 --allowed-host llm.example

The endpoints are OpenAI's, and a "model" is an adapter's name or the base's. Keys are best given in the environment or a --config file: other users of a
machine can see the command line. TLS and limits by address are a proxy's to add.`;

export function serveCommand(): Command {
  const command = new Command("serve")
    .description("answer requests over HTTP as OpenAI does, by the model and its adapters")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .option("--served-model-name <name>", "what clients call the base (default: the last part of --model)")
    .addOption(templateOption())
    .addOption(namedAdaptersOption())
    .option("--adapter-dir <dir>", "directory of adapter directories that --allow-runtime-lora may load")
    .option("--allow-runtime-lora", "let --admin-key load and unload adapters (/v1/load_lora_adapter)")
    .option("--host <address>", "address to listen at; any but this machine's own needs --api-key", "127.0.0.1")
    .addOption(whole("serve", "--port <n>", "port to listen at; 0 takes a free one", 0, 8000))
    .option("--allowed-host <name...>", "further names that clients know the server by (their Host header)")
    .option("--cors-origin <origin...>", "origins of web pages that may ask, such as https://chat.example")
    .addOption(new Option("--api-key <key...>", "keys, one of which a client must send").env("LOWRANK_API_KEY"))
    .addOption(new Option("--admin-key <key>", "key of who loads and unloads adapters").env("LOWRANK_ADMIN_KEY"));
  for (const option of cacheOptions("serve")) command.addOption(option);
  return command
    .addOption(whole("serve", "--max-rows <n>", "requests that are answered at a time, in one batch", 1, 32))
    .addOption(whole("serve", "--max-step-tokens <n>", "tokens of a step: long prompts go in so large pieces", 1, 256))
    .addOption(
      whole(
        "serve",
        "--cache-tokens <n>",
        "tokens of keys and values kept in all (default: 4 times the context, but no more than 16,384 or the context, if that is more)",
        1,
      ),
    )
    .addOption(whole("serve", "--max-loras <n>", "adapters on the device at a time; the others wait on the host", 1, 8))
    .addOption(
      whole("serve", "--max-lora-rank <n>", "largest rank of an adapter (default: that of --adapter, or 16)", 1),
    )
    .addOption(whole("serve", "--max-queue <n>", "requests that may wait; more are told to come again (429)", 0, 64))
    .addOption(
      whole("serve", "--max-concurrent <n>", "answers at a time for one key; each choice of a request counts", 1, 64),
    )
    .addOption(whole("serve", "--max-connections <n>", "connections at a time (in Node)", 1, 1024))
    .addOption(whole("serve", "--max-tokens <n>", "most that a request may ask for (default: the context)", 1))
    .addOption(
      timeOption("serve", "--shutdown-timeout <time>", "how long answers may go on when it is stopped").default(
        30e3,
        "30s",
      ),
    )
    .option("--quiet", "no line for each request")
    .addOption(configOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

async function run(options: ServeArguments): Promise<void> {
  demandKeys(options);
  const { apiKey: apiKeys, adminKey, host, corsOrigin: origins } = options;
  const { model: path, baseModel } = await located({
    model: options.model,
    ...(options.revision !== undefined && { revision: options.revision }),
  });
  const modelName =
    options.servedModelName ?? (existsSync(options.model) ? basename(resolve(options.model)) : baseModel);
  const adapters = await adaptersOf("serve", options.adapter ?? [], modelName);
  const runtime = options.allowRuntimeLora ? directoriesIn(options.adapterDir ?? "") : undefined;
  const tokenizer = await loadTokenizer(diskDirectory(path));
  const renderChat = await openTemplate(path, options.chatTemplate);
  await withGpu(async (gpu) => {
    const { maxRows, maxStepTokens, maxQueue: maxWaiting, cacheFormat, cacheTokens, context: contextLength } = options;
    const engine = await openEngine(gpu, path, adapters, {
      ...{ quantize: options.quantize, maxRows, maxStepTokens, maxWaiting, cacheFormat, cacheTokens, contextLength },
      ...{ slots: options.maxLoras, maxRank: options.maxLoraRank, mayLoad: options.allowRuntimeLora ?? false },
    });
    const app = createApp({
      ...{ engine, tokenizer, renderChat, modelName, apiKeys, adminKey, origins },
      hosts: [...hostsOf(host), ...(options.allowedHost ?? [])],
      adapterDirectory: runtime,
      limits: {
        concurrentPerKey: options.maxConcurrent,
        ...(options.maxTokens !== undefined && { maxTokens: Math.min(options.maxTokens, engine.contextLength) }),
      },
      log: options.quiet ? undefined : say,
      onError: (error) => say(`error: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`),
      fingerprint: `lowrank-${version()}`,
    });
    const stopped = stopSignal();
    const server = await listen(app, { host, port: options.port, maxConnections: options.maxConnections });
    const shown = host.includes(":") ? `[${host}]` : host;
    say(`serving ${[modelName, ...engine.adapters].join(", ")} at http://${shown}:${server.port}/v1`);
    say(`${await stopped}: no more requests are taken; answers may go on for ${options.shutdownTimeout / 1000} s`);
    const closed = server.close();
    await app.drain(options.shutdownTimeout);
    // Who has an answer has it by now; a connection that sends a request for longer is not waited for.
    const rest = setTimeout(() => server.cutOff(), 1000);
    await closed;
    clearTimeout(rest);
    await engine.close();
  });
}

const LOOPBACK = ["127.0.0.1", "localhost", "::1"];
const LEAST_KEY = 32;

/** Throws ShapeError where somebody could get in who should not. */
function demandKeys({ host, apiKey = [], adminKey, allowRuntimeLora, adapterDir }: ServeArguments): void {
  const isOpen = !LOOPBACK.includes(host);
  const fresh = Buffer.from(crypto.getRandomValues(new Uint8Array(32))).toString("base64url");
  if (isOpen && apiKey.length === 0)
    throw new ShapeError(
      `serve: --host ${host} must go with an --api-key, got none. Here is a fresh one: LOWRANK_API_KEY=${fresh}`,
    );
  const keys = [...apiKey, ...(adminKey === undefined ? [] : [adminKey])];
  if (isOpen && keys.some((key) => key.length < LEAST_KEY))
    throw new ShapeError(
      `serve: with --host ${host} a key must have at least ${LEAST_KEY} characters, got one with fewer. Here is a fresh one: ${fresh}`,
    );
  if (allowRuntimeLora && adapterDir === undefined)
    throw new ShapeError("serve: --allow-runtime-lora must go with an --adapter-dir, got none");
  if (allowRuntimeLora && adminKey === undefined)
    throw new ShapeError(
      `serve: --allow-runtime-lora must go with an --admin-key, got none. Here is a fresh one: LOWRANK_ADMIN_KEY=${fresh}`,
    );
}

/** Names by which a server at this address may be known. */
function hostsOf(host: string): string[] {
  const isAny = host === "0.0.0.0" || host === "::";
  if (!isAny) return [...LOOPBACK, host];
  const addresses = Object.values(networkInterfaces()).flatMap((all) => all ?? []);
  return [...LOOPBACK, thisHost(), ...addresses.map(({ address }) => address.replace(/%.*$/, ""))];
}

/** The first signal to stop; the next one stops it at once. */
const stopSignal = (): Promise<string> =>
  new Promise((onStop) => {
    const stop = (name: string): void => {
      for (const one of SIGNALS) process.off(one, stop);
      onStop(name);
    };
    for (const name of SIGNALS) process.on(name, stop);
  });
const SIGNALS = ["SIGINT", "SIGTERM"] as const;
