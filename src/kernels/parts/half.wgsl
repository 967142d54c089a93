// Operands staged and multiplied in f16, summed in f32. For devices with shader-f16.
enable f16;

alias Staged = vec4h;
