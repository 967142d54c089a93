/** Data files that cannot be used. */

export interface Malformed {
  readonly what: string;
  readonly file: string;
  readonly content: string | Uint8Array;
  readonly args?: readonly string[];
  /** After the path of the file. */
  readonly message: string;
}

const bytes = (...values: number[]): Uint8Array => Uint8Array.from(values);
const utf16 = (text: string): Uint8Array =>
  Uint8Array.from([...text].flatMap((c) => [c.charCodeAt(0) & 255, c.charCodeAt(0) >> 8]));
const joined = (...parts: (string | Uint8Array)[]): Uint8Array =>
  Uint8Array.from(parts.flatMap((part) => [...(typeof part === "string" ? new TextEncoder().encode(part) : part)]));
const good = '{"text":"a"}\n';
const user = '{"role":"user","content":"a"}';
const of = (
  what: string,
  message: string,
  file: string,
  content: string | Uint8Array,
  ...args: string[]
): Malformed => ({
  ...{ what, file, content, message, args },
});

const forms =
  '{"messages"}, {"prompt","completion"}, {"text"}, {"instruction","output"}, {"conversations"}, {"segments"} or {"input_ids"}';
/** What this version of JavaScript says about the text. */
function notJson(where: string, text: string): string {
  try {
    JSON.parse(text);
  } catch (error) {
    return `${where}must be JSON, got ${JSON.stringify(text)} (${(error as Error).message})`;
  }
  throw new Error(`malformed: must not be JSON, got ${text}`);
}

export const MALFORMED: readonly Malformed[] = [
  of(
    "UTF-16 with its mark",
    ": must be UTF-8 text, got UTF-16. Save it as UTF-8",
    "a.jsonl",
    joined(bytes(0xff, 0xfe), utf16(good)),
  ),
  of(
    "UTF-16 the other way round",
    ": must be UTF-8 text, got UTF-16. Save it as UTF-8",
    "a.jsonl",
    joined(bytes(0xfe, 0xff, 0), utf16(good)),
  ),
  of("UTF-16 without a mark", ":1: must be text, got a NUL byte. Save it as UTF-8", "a.jsonl", utf16(good)),
  of(
    "Latin-1 in the second line",
    ":2: must be UTF-8 text, got bytes that are not. Save it as UTF-8",
    "a.jsonl",
    joined(good, '{"text":"caf', bytes(0xe9), '"}\n'),
  ),
  of(
    "half a character at the end",
    ":1: must be UTF-8 text, got bytes that are not. Save it as UTF-8",
    "a.txt",
    joined("caf", bytes(0xc3)),
  ),
  of("a NUL byte", ":2: must be text, got a NUL byte. Save it as UTF-8", "a.csv", "text\na\0b\n"),
  of("gzip", ": must be UTF-8 text, got a gzip file. Unpack it", "a.jsonl", bytes(0x1f, 0x8b, 8, 0)),
  of("Zstandard", ": must be UTF-8 text, got a Zstandard file. Unpack it", "a.jsonl", bytes(0x28, 0xb5, 0x2f, 0xfd)),
  of("ZIP", ": must be UTF-8 text, got a ZIP file. Unpack it", "a.csv", bytes(0x50, 0x4b, 3, 4)),
  of("Parquet by another name", ": must be UTF-8 text, got a Parquet file. Name it .parquet", "a.jsonl", "PAR1"),
  of(
    "another ending",
    ": the name of a data file must end with .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt, got .xlsx",
    "a.xlsx",
    good,
  ),
  of(
    "no ending",
    ": the name of a data file must end with .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt, got no ending",
    "data",
    good,
  ),
  of(
    "nothing",
    `: must have at least one row, got an empty file. Write one JSON object per line: ${forms}`,
    "a.jsonl",
    "",
  ),
  of(
    "blank lines",
    `: must have at least one row, got an empty file. Write one JSON object per line: ${forms}`,
    "a.jsonl",
    "\n \n",
  ),
  of("half a line of JSON", notJson(":2: ", '{"text":"a'), "a.jsonl", `${good}{"text":"a`),
  of("two objects in a line", notJson(":1: ", '{"text":"a"}{"text":"b"}'), "a.jsonl", '{"text":"a"}{"text":"b"}'),
  of("a comma at the end of a line", notJson(":1: ", '{"text":"a"},'), "a.jsonl", '{"text":"a"},\n'),
  of("single quotes", notJson(":1: ", "{'text':'a'}"), "a.jsonl", "{'text':'a'}"),
  of("NaN", notJson(":1: ", '{"input_ids":[NaN]}'), "a.jsonl", '{"input_ids":[NaN]}'),
  of(
    "a number too large",
    ":1: input_ids must be whole numbers from 0 to 511, got Infinity at index 0. Was this made for another model?",
    "a.jsonl",
    '{"input_ids":[1e999]}',
  ),
  of(
    "a fraction",
    ":1: input_ids must be whole numbers from 0 to 511, got 1.5 at index 0. Was this made for another model?",
    "a.jsonl",
    '{"input_ids":[1.5]}',
  ),
  of(
    "a string for an id",
    ':1: input_ids must be whole numbers from 0 to 511, got "1" at index 0. Was this made for another model?',
    "a.jsonl",
    '{"input_ids":["1"]}',
  ),
  of("a key twice", ':1: a key must not occur twice, got "text"', "a.jsonl", '{"text":"a","text":"b"}'),
  of(
    "a key twice inside",
    ':1: a key must not occur twice, got "role"',
    "a.jsonl",
    '{"messages":[{"role":"user","role":"user","content":"a"}]}',
  ),
  of(
    "half of a surrogate pair",
    ':1: "text" must be Unicode text, got half of a surrogate pair',
    "a.jsonl",
    String.raw`{"text":"\ud83d"}`,
  ),
  of("a list for a row", ":3: must be a JSON object, got [1]", "a.jsonl", `${good}\n[1]`),
  of("no form", `:1: a row must be ${forms}, got "question", "answer"`, "a.jsonl", '{"question":"a","answer":"b"}'),
  of(
    "two forms",
    ':1: a row must have one form, got both "prompt","completion" and "text". Leave one of them out',
    "a.jsonl",
    '{"text":"a","prompt":"b","completion":"c"}',
  ),
  of("text that is a number", ':1: "text" must be a string, got 1', "a.jsonl", '{"text":1}'),
  of(
    "a prompt without its kind",
    ':1: "prompt" and "completion" must both be strings, or both lists of messages',
    "a.jsonl",
    `{"prompt":[${user}],"completion":"b"}`,
  ),
  of(
    "messages that are text",
    ':1: "messages" must be a list of messages, got "hello"',
    "a.jsonl",
    '{"messages":"hello"}',
  ),
  of("no messages", ':1: "messages" must be a list of messages, got []', "a.jsonl", '{"messages":[]}'),
  of(
    "a message that is text",
    ':1: messages[1] must be an object, got "hello"',
    "a.jsonl",
    `{"messages":[${user},"hello"]}`,
  ),
  of(
    "a role nobody has",
    ':1: messages[0].role must be system, developer, user, assistant, tool, got "robot"',
    "a.jsonl",
    '{"messages":[{"role":"robot","content":"a"}]}',
  ),
  of(
    "no role",
    ":1: messages[0].role must be system, developer, user, assistant, tool, got none",
    "a.jsonl",
    '{"messages":[{"content":"a"}]}',
  ),
  of(
    "an empty turn",
    ":1: messages[1] must have content or tool_calls, got none",
    "a.jsonl",
    `{"messages":[${user},{"role":"assistant","content":""}]}`,
  ),
  of(
    "an image",
    ':1: messages[0].content must be text or text parts, got {"type":"image"}',
    "a.jsonl",
    '{"messages":[{"role":"user","content":[{"type":"image"}]}]}',
  ),
  of(
    "a call without a name",
    ':1: messages[1].tool_calls[0] must have the name of a function, got {"function":{}}',
    "a.jsonl",
    `{"messages":[${user},{"role":"assistant","tool_calls":[{"function":{}}]}]}`,
  ),
  of(
    "arguments that are no JSON",
    notJson(":1: messages[1].tool_calls[0].arguments: ", "{x"),
    "a.jsonl",
    `{"messages":[${user},{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{x"}}]}]}`,
  ),
  of(
    "calls that are no list",
    ":1: messages[1].tool_calls must be a list, got {}",
    "a.jsonl",
    `{"messages":[${user},{"role":"assistant","tool_calls":{}}]}`,
  ),
  of(
    "tools that are text",
    ':1: "tools" must be a list of objects, got "weather"',
    "a.jsonl",
    `{"messages":[${user}],"tools":"weather"}`,
  ),
  of(
    "a template that refuses",
    ":1: the chat template must take these messages, got After user must not come user",
    "a.jsonl",
    `{"messages":[${user},${user}]}`,
    "--chat-template",
    "test/golden/chat/instructions.jinja",
  ),
  of(
    "ShareGPT with a stranger",
    ':1: conversations[0].from must be system, human, user, gpt, assistant, tool, observation, function_call, got "narrator"',
    "a.jsonl",
    '{"conversations":[{"from":"narrator","value":"a"}]}',
  ),
  of(
    "ShareGPT without turns",
    ':1: "conversations" must be a list of {"from","value"}, got {}',
    "a.jsonl",
    '{"conversations":{}}',
  ),
  of(
    "an instruction that is a list",
    ':1: "instruction" must be a string, got ["a"]',
    "a.jsonl",
    '{"instruction":["a"],"output":"b"}',
  ),
  of(
    "a history of single texts",
    ':1: "history" must be a list of pairs of texts, got ["c"]',
    "a.jsonl",
    '{"instruction":"a","output":"b","history":["c"]}',
  ),
  of(
    "a segment without a label",
    ":1: segments[0].label must be true or false, got none",
    "a.jsonl",
    '{"segments":[{"text":"a"}]}',
  ),
  of("no segments", ':1: "segments" must be a list of {"label","text"}, got []', "a.jsonl", '{"segments":[]}'),
  of(
    "labels of another length",
    ":1: labels must be as many as input_ids (2), got 1. Do not shift them, and write -100 where a token is not to be learned",
    "a.jsonl",
    '{"input_ids":[1,2],"labels":[1]}',
  ),
  of(
    "an id the model has not",
    ":1: input_ids must be whole numbers from 0 to 511, got 512 at index 1. Was this made for another model?",
    "a.jsonl",
    '{"input_ids":[1,512]}',
  ),
  of(
    "nothing to learn",
    ": a row must leave a token to learn, got 1 rows with none in their first 128. Raise maxLength, or shorten the prompts",
    "a.jsonl",
    `{"messages":[${user}]}`,
  ),
  of(
    "a JSON list that does not end",
    ':3: a JSON list must end with "]", got the end of the file',
    "a.json",
    '[\n{"text":"a"},\n{"text":"b"}\n',
  ),
  of(
    "a JSON list with something behind it",
    ":3: nothing may follow a JSON list, got {",
    "a.json",
    '[{"text":"a"}]\n\n{"text":"b"}',
  ),
  of("a JSON list with an empty item", notJson(":2: ", ""), "a.json", '[{"text":"a"},\n,{"text":"b"}]'),
  of("a JSON list of texts", ':2: must be a JSON object, got "b"', "a.json", '[{"text":"a"},\n"b"]'),
  of(
    "a quote that does not end",
    ":4: must be CSV, got a quote that is not closed. Quote a cell that holds quotes, and double them",
    "a.csv",
    'text\na\n"b\nc\n',
  ),
  of(
    "a quote inside a cell",
    ":3: must be CSV, got a quote inside a cell that does not begin with one. Quote a cell that holds quotes, and double them",
    "a.csv",
    'text\na\nb "c" d"\n"e" f\n',
  ),
  of(
    "a cell too many",
    ":3: a row must have 2 cells, as many as line 1, got 3. Quote cells that hold the separator",
    "a.csv",
    "prompt,completion\na,b\nc,d,e\n",
  ),
  of("a column twice", ':1: a column must not occur twice, got "text"', "a.csv", "text,text\na,b\n"),
  of(
    "names only",
    `: must have at least one row, got an empty file. Write one JSON object per line: ${forms}`,
    "a.csv",
    "prompt,completion\n",
  ),
  of(
    "a cell that is no list",
    ':2: a cell of "messages" must be a JSON list, got "hello"',
    "a.tsv",
    "messages\nhello\n",
  ),
  of(
    "no Parquet",
    ": must be a Parquet file that can be read, got an error (parquet file invalid (footer != PAR1))",
    "a.parquet",
    "PAR1 is how it begins",
  ),
  of("an empty Parquet file", ": must be a Parquet file, got 0 bytes", "a.parquet", ""),
  of(
    "a line without the separator",
    ':2: a line must have "||" between prompt and completion, got "c"',
    "a.txt",
    "a||b\nc\n",
    "--prompt-separator",
    "||",
  ),
];
