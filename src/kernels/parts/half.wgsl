// Operands staged and multiplied in f16, summed in f32. For devices with shader-f16: half the workgroup memory, twice the rate where f16
// has it. Operands and products are rounded, each by up to 2⁻¹¹, so an element of x·w is off by up to 1.5·2⁻¹⁰·Σ|x·w|; a product
// beyond 65504 is infinite.
enable f16;

alias Staged = vec4h;
