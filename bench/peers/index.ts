/** The peers, and what opens them. */
import { jaxJs } from "./jax-js.ts";
import { onnxruntimeWeb } from "./onnxruntime-web.ts";
import type { PeerSource } from "./peer.ts";
import { tfjs } from "./tfjs.ts";

export const PEERS: readonly PeerSource[] = [jaxJs, tfjs, onnxruntimeWeb];
