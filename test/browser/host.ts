/** What `portable.ts` cannot do in its page: a Hub on this machine, its faults, and how much the browser lets a site keep. */
import { readFileSync } from "node:fs";
import type { Host } from "../../scripts/run-in-chromium.ts";
import { type FakeHub, startHub } from "../io/hub-server.ts";

const ID = "org/stories";
const COMMIT = "0123456789abcdef0123456789abcdef01234567";

export const host: Host = (page) => {
  let hub: FakeHub;
  return {
    /** The model of `shared/models/stories260K`. */
    async startHub(): Promise<string> {
      const files = Object.fromEntries(
        ["config.json", "model.safetensors"].map((file) => [
          file,
          readFileSync(`../shared/models/stories260K/${file}`),
        ]),
      );
      hub = await startHub();
      hub.models.set(ID, { commit: COMMIT, refs: { main: COMMIT }, files });
      return hub.url;
    },
    /** The store answers so many requests; the next one breaks in the middle, and nobody is there for those after it. */
    breakAfter(requests: number, bytes: number): void {
      let left = requests;
      hub.arrived = () => Number.POSITIVE_INFINITY;
      hub.fault = (asked) => {
        if (asked.host !== "store" || left-- > 0) return undefined;
        return left === -1 ? { cutAfter: bytes } : { status: 503 };
      };
    },
    /** A store that gives other bytes than it should. */
    damage(): void {
      hub.fault = ({ host: at, range }) => {
        const [first = 0, last = 0] = range?.match(/\d+/g)?.map(Number) ?? [];
        if (at !== "store") return undefined;
        const headers = { "content-range": `bytes ${first}-${last}/0`, "access-control-expose-headers": "*" };
        return { status: 206, headers, body: new Uint8Array(last - first + 1) };
      };
    },
    mend(): void {
      hub.fault = () => undefined;
    },
    /** Ranges that the store was asked for since the last call. */
    askedRanges: (): (string | undefined)[] =>
      hub.asked.splice(0).flatMap(({ host: at, range }) => (at === "store" ? [range] : [])),
    closeHub: (): Promise<void> => hub.close(),
    /** Bytes that the browser lets this site keep. */
    async setQuota(quotaSize: number): Promise<void> {
      const session = await page.context().newCDPSession(page);
      await session.send("Storage.overrideQuotaForOrigin", { origin: new URL(page.url()).origin, quotaSize });
    },
  };
};
