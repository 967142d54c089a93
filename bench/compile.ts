/** Compiles WGSL with whatever compiler the runtime has: Tint in Node and Chromium, naga in Deno. */

export interface Shader {
  readonly name: string;
  readonly source: string;
  readonly constants?: Readonly<Record<string, number>>;
}

/**
 * Everything the compiler says of these shaders and, unless told `pipelines: false`, of their pipelines, warnings included; empty if
 * it accepts them all. A pipeline takes the driver's compiler too, which may be a hundred times slower.
 */
export async function compileErrors(
  device: GPUDevice,
  shaders: readonly Shader[],
  { pipelines = true }: { readonly pipelines?: boolean } = {},
): Promise<string[]> {
  const errors: string[] = [];
  for (const { name, source, constants = {} } of shaders) {
    device.pushErrorScope("validation");
    const module = device.createShaderModule({ label: name, code: source });
    if (pipelines)
      device.createComputePipeline({ label: name, layout: "auto", compute: { module, entryPoint: "main", constants } });
    const failure = await device.popErrorScope();
    const { messages } = await module.getCompilationInfo();
    errors.push(...messages.map(({ type, lineNum, message }) => `${name}: ${type} ${lineNum}: ${message}`));
    if (failure && messages.length === 0) errors.push(`${name}: ${failure.message}`);
  }
  return errors;
}
