/** A chat in a worker, asked by the page: two adapters at once, one that the worker has and one that the page gives it. */
import { createChat } from "../../src/browser.ts";
import {
  attachLora,
  type Directory,
  type Gpu,
  generate,
  httpDirectory,
  loadModel,
  loadPeft,
  memoryDirectory,
  openGpu,
  Random,
  savePeft,
} from "../../src/index.ts";
import { openChat, serveChat } from "../../src/serve.ts";
import { lettersTemplate, lettersTokenizer } from "../serve/letters.ts";

type Check = (what: string, found: unknown, wanted: unknown) => void;

/** What the worker is called. */
export const CHAT = "chat";

const files = (): Directory => httpDirectory(`${location.origin}/test/golden/llama-default`);
const given = (): Directory => httpDirectory(`${location.origin}/test/golden/llama-default/adapter`);

/** The worker's side. */
export function startChat(): void {
  const open = async (): ReturnType<typeof openChat> =>
    openChat(await loadModel(await openGpu(), files()), {
      ...{ tokenizer: lettersTokenizer, renderChat: lettersTemplate },
      ...{ adapters: { given: given() }, pool: { slots: 2 } },
    });
  serveChat(open(), self);
}

const QUESTION = { messages: [{ role: "user", content: "who are you" }] };
const QUESTION_IDS = lettersTokenizer.encode("user who are you. assistant ", { addSpecialTokens: false });
const TOKENS = 16;

/** The page's side. */
export async function checkChat(gpu: Gpu, check: Check): Promise<void> {
  const model = await loadModel(gpu, files());
  const own = await madeAdapter(model);
  const alone = async (directory: Directory | undefined): Promise<string> => {
    const adapter = directory && (await loadPeft(model, directory));
    const ids: number[] = [];
    for await (const id of generate(model, { promptIds: QUESTION_IDS, maxTokens: TOKENS })) ids.push(id);
    adapter?.detach();
    return lettersTokenizer.decode(ids);
  };
  const wanted = [await alone(undefined), await alone(given()), await alone(memoryDirectory("own", own))];
  model.destroy();
  check("the adapters change the answer", new Set(wanted).size, 3);

  const chat = createChat(new Worker("/.script.js", { type: "module", name: CHAT }));
  const blobs = Object.entries(own).map(
    ([name, content]) => [name, new Blob([content as Uint8Array<ArrayBuffer> | string])] as const,
  );
  await chat.load("own", Object.fromEntries(blobs));
  check("a chat in a worker has its adapters", await chat.adapters(), ["given", "own"]);
  const answer = async (adapter: string | undefined): Promise<string> => {
    let text = "";
    for await (const piece of chat.ask({ ...QUESTION, adapter, maxTokens: TOKENS })) text += piece.text;
    return text;
  };
  check(
    "and answers with two of them and none at once as each does alone",
    await Promise.all([undefined, "given", "own"].map(answer)),
    wanted,
  );
  const stop = new AbortController();
  let pieces = 0;
  for await (const { text } of chat.ask({ prompt: "a", logitBias: new Map([[2, -1e9]]), signal: stop.signal }))
    if (text !== "" && pieces++ === 0) stop.abort();
  check("an abort reaches it", pieces < 60 && (await chat.stats()).running === 0, true);
  const words = await answer("other").catch((error: Error) => `${error.name}: ${error.message}`);
  check("so do errors the page", words, 'ShapeError: generate: the adapter must be one of given, own, got "other"');
  await chat.close();

  const broken = createChat(new Worker("/no-such-script.js", { type: "module" }));
  check(
    "a worker without a script rejects its calls",
    await broken.adapters().catch((error: Error) => error.message),
    "createChat: the worker must run, got no script",
  );
}

async function madeAdapter(
  model: Awaited<ReturnType<typeof loadModel>>,
): Promise<Readonly<Record<string, Uint8Array | string>>> {
  const random = new Random(5);
  const adapter = attachLora(model, { r: 3, alpha: 6, targetModules: "all-linear" }, 3);
  for (const parameter of adapter.parameters)
    model.gpu.write(
      parameter,
      Float32Array.from({ length: parameter.size }, () => random.normal(0, 0.25)),
    );
  const saved = savePeft(adapter, "base");
  const parts: Uint8Array[] = [];
  for await (const part of saved["adapter_model.safetensors"]) parts.push(part);
  adapter.detach();
  const weights = new Uint8Array(await new Blob(parts as Uint8Array<ArrayBuffer>[]).arrayBuffer());
  return { "adapter_config.json": saved["adapter_config.json"], "adapter_model.safetensors": weights };
}
