/** Models, golden runs and data that live beside the repository and are too large for it; tests that need them skip without. */
import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("../../shared/", import.meta.url));

export const hasShared: boolean = existsSync(root);

/** The path of something in there, e.g. `shared("models/stories260K")`. */
export const shared = (path: string): string => root + path;
