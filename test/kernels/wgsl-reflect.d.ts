// The default entry of wgsl_reflect is empty in Node; the one that works comes without types.
declare module "wgsl_reflect/wgsl_reflect.module.js" {
  export * from "wgsl_reflect";
}
