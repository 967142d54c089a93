// finish(value) = act(value + bias[column]) + residual[row,column]        act: `activate` of unary.wgsl
//   bias [N]   residual [M,N], or [batch,M,N]   f32

override BIAS: u32 = 0;
override ACT: u32 = 0;
override RESIDUAL: u32 = 0;

@group(0) @binding(7) var<storage, read> bias: array<f32>;
@group(0) @binding(8) var<storage, read> residual: array<f32>;

fn finish(value: f32, row: u32, column: u32) -> f32 {
  var result = value;
  if (BIAS == 1u) { result += bias[column]; }
  if (ACT == 1u) { result = activate(result); }
  if (RESIDUAL == 1u) { result += residual[row * d.N + column]; }
  return result;
}
