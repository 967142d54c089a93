/** What a step spends its time on, as a page. Apart from the engine, whose entry stays small. */
import { type KernelProfile, profileTable } from "./profile.ts";

/**
 * A page with the table and, where there are times, the roofline plot: operations per second over operations per byte, both logarithmic, a
 * point for each kernel with operations to count (Williams et al., CACM 52(4), 2009). The roofs are the best rates seen in this profile.
 */
export function profilePage(kernels: readonly KernelProfile[], title: string): string {
  const points = kernels.flatMap(({ kernel, timeMs, flops, bytes }) =>
    timeMs && flops > 0 ? [{ kernel, x: flops / bytes, y: flops / timeMs / 1e6, bandwidth: bytes / timeMs / 1e6 }] : [],
  );
  const html = (text: string): string => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
  return `<!doctype html>
<html lang="en"><meta charset="utf-8"><title>${html(title)}</title>
<style>body{font:14px system-ui;margin:2em}svg{max-width:720px}text{font:12px system-ui}pre{overflow:auto}</style>
<h1>${html(title)}</h1>
${points.length > 0 ? roofline(points, kernels) : "<p>This device has no clock for its dispatches: operations and bytes are counted.</p>"}
<pre>${html(profileTable(kernels))}</pre></html>
`;
}

function roofline(
  points: readonly { readonly kernel: string; readonly x: number; readonly y: number }[],
  kernels: readonly KernelProfile[],
): string {
  const peak = Math.max(...points.map(({ y }) => y));
  const bandwidth = Math.max(...kernels.map(({ timeMs, bytes }) => (timeMs ? bytes / timeMs / 1e6 : 0)));
  const [left, right] = [
    Math.min(...points.map(({ x }) => x), peak / bandwidth) / 2,
    4 * Math.max(...points.map(({ x }) => x)),
  ];
  const low = Math.min(...points.map(({ y }) => y), left * bandwidth) / 2;
  const X = (x: number): string => (50 + (640 * Math.log(x / left)) / Math.log(right / left)).toFixed(1);
  const Y = (y: number): string => (360 - (330 * Math.log(y / low)) / Math.log((2 * peak) / low)).toFixed(1);
  const ridge = peak / bandwidth;
  const roof = `${X(left)},${Y(Math.min(peak, left * bandwidth))} ${X(Math.max(left, ridge))},${Y(peak)} ${X(right)},${Y(peak)}`;
  const dots = points.map(
    ({ kernel, x, y }) =>
      `<circle cx="${X(x)}" cy="${Y(y)}" r="4"/><text x="${X(x)}" y="${Y(y)}" dx="7" dy="4">${kernel}</text>`,
  );
  return `<svg viewBox="0 0 720 400" role="img" aria-label="roofline"><polyline points="${roof}" fill="none" stroke="currentColor"/>
${dots.join("\n")}
<text x="50" y="390">operations per byte, from ${left.toFixed(2)} to ${right.toFixed(0)}; roofs: ${peak.toFixed(1)} GFLOP/s, ${bandwidth.toFixed(1)} GB/s, the best seen here</text></svg>`;
}
