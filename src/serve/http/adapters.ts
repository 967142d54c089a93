/** vLLM's endpoints to load and unload adapters while the server runs. */
import type { Directory } from "../../io/bytes.ts";
import { FormatError } from "../../io/errors.ts";
import { ShapeError } from "../../tensor/errors.ts";
import type { Engine } from "../engine-types.ts";
import { ApiError } from "./errors.ts";
import { type Fields, refused } from "./fields.ts";

/** No path: it cannot begin with a dot and has no separator. */
const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;
const RULE = "1 to 64 letters, digits, dots, dashes and underscores, the first a letter or digit, no two dots in a row";

/** Whether an adapter may have this name. */
export const isAdapterName = (name: string): boolean => NAME.test(name) && !name.includes("..");

/** The directory of this name where adapters are kept; undefined where there is none. `name` keeps to `isAdapterName`. */
export type FindAdapter = (name: string) => Promise<Directory | undefined>;

export class RuntimeAdapters {
  readonly #engine: Engine;
  readonly #modelName: string;
  readonly #find: FindAdapter;
  readonly #busy = new Set<string>();

  constructor(engine: Engine, modelName: string, find: FindAdapter) {
    this.#engine = engine;
    this.#modelName = modelName;
    this.#find = find;
  }

  /** `{"lora_name","lora_path"}`; the path is the name of a directory among the adapters. Gives a line that says what was done. */
  load(fields: Fields): Promise<string> {
    const name = nameOf(fields, "lora_name");
    const place = nameOf(fields, "lora_path");
    if (name === this.#modelName || this.#engine.adapters.includes(name))
      throw new ApiError(400, `The lora adapter '${name}' has already been loaded.`, { param: "lora_name" });
    return this.#alone(name, async () => {
      const directory = await this.#find(place);
      if (!directory)
        throw new ApiError(
          404,
          `\`lora_path\` must be the name of a directory in the server's --adapter-dir, got "${place}"`,
          {
            param: "lora_path",
          },
        );
      try {
        await this.#engine.load(name, directory);
      } catch (error) {
        if (error instanceof FormatError || error instanceof ShapeError)
          throw new ApiError(400, error.message, { param: "lora_path" });
        throw error;
      }
      return `Success: LoRA adapter '${name}' added successfully.`;
    });
  }

  /** `{"lora_name"}` */
  unload(fields: Fields): Promise<string> {
    const name = nameOf(fields, "lora_name");
    if (!this.#engine.adapters.includes(name))
      throw new ApiError(404, `The lora adapter '${name}' cannot be found.`, { param: "lora_name" });
    return this.#alone(name, async () => {
      await this.#engine.unload(name);
      return `Success: LoRA adapter '${name}' removed successfully.`;
    });
  }

  async #alone(name: string, action: () => Promise<string>): Promise<string> {
    if (this.#busy.has(name))
      throw new ApiError(409, `The lora adapter '${name}' is being loaded or unloaded.`, { param: "lora_name" });
    this.#busy.add(name);
    try {
      return await action();
    } finally {
      this.#busy.delete(name);
    }
  }
}

function nameOf(fields: Fields, field: string): string {
  const name = fields.text(field);
  if (name === undefined || !isAdapterName(name)) throw refused(field, RULE, name);
  return name;
}
