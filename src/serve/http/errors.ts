/** Errors as OpenAI's clients read them. */

/** By status, as vLLM names them: what OpenAI's clients make classes of. */
const TYPES = {
  400: "BadRequestError",
  401: "AuthenticationError",
  403: "PermissionDeniedError",
  404: "NotFoundError",
  405: "MethodNotAllowedError",
  408: "RequestTimeoutError",
  409: "ConflictError",
  413: "PayloadTooLargeError",
  415: "UnsupportedMediaTypeError",
  429: "RateLimitError",
  431: "RequestHeaderFieldsTooLargeError",
  500: "InternalServerError",
  503: "ServiceUnavailableError",
} as const;

export type ErrorStatus = keyof typeof TYPES;

/** What a client is told: its message goes out as it is, so it holds no path and nothing of the code. */
export class ApiError extends Error {
  override readonly name = "ApiError";
  readonly status: ErrorStatus;
  /** The field of the request that is wrong. */
  readonly param: string | null;
  readonly headers: Readonly<Record<string, string>>;

  constructor(
    status: ErrorStatus,
    message: string,
    { param = null, headers = {} }: { readonly param?: string | null; readonly headers?: Record<string, string> } = {},
  ) {
    super(message);
    this.status = status;
    this.param = param;
    this.headers = headers;
  }

  get body(): { error: { message: string; type: string; param: string | null; code: number } } {
    const { message, status, param } = this;
    return { error: { message, type: TYPES[status], param, code: status } };
  }
}
