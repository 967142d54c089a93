/** Counts the bytes of a device's buffers, whoever makes them: ours and the peers' alike. */

const counted = new WeakMap<GPUDevice, DeviceMemory>();

export class DeviceMemory {
  /** Buffers that were made since it is counted, and not destroyed. */
  readonly buffers: Set<GPUBuffer> = new Set();
  #live = 0;
  #peak = 0;

  /** Bytes of `buffers`. */
  get live(): number {
    return this.#live;
  }

  /** The most `live` has been since `restart`. */
  get peak(): number {
    return this.#peak;
  }

  restart(): void {
    this.#peak = this.#live;
  }

  /** Counts this buffer until it is destroyed. */
  take(buffer: GPUBuffer): void {
    this.buffers.add(buffer);
    this.#live += buffer.size;
    this.#peak = Math.max(this.#peak, this.#live);
    const destroy = buffer.destroy.bind(buffer);
    buffer.destroy = () => {
      if (this.buffers.delete(buffer)) this.#live -= buffer.size;
      return destroy();
    };
  }
}

/** The memory of this device, counted from the first call on: there is one count per device. */
export function memoryOf(device: GPUDevice): DeviceMemory {
  const known = counted.get(device);
  if (known) return known;
  const memory = new DeviceMemory();
  counted.set(device, memory);
  const createBuffer = device.createBuffer.bind(device);
  device.createBuffer = (descriptor) => {
    const buffer = createBuffer(descriptor);
    memory.take(buffer);
    return buffer;
  };
  return memory;
}
