import { createHash } from "node:crypto";
import { describe, expect, test } from "vitest";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { CHATML, chatTemplate, loadChatTemplate, strftime } from "../../src/io/chat-template.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { loadTokenizer } from "../../src/io/tokenizer.ts";
import { golden, goldenTemplate, TEMPLATES } from "../golden/chat/files.ts";
import { hasShared, shared } from "../shared.ts";

const cases = TEMPLATES.flatMap((template) =>
  Object.entries(golden[template]).map(([name, want]) => ({ template, name, want })),
);

test.each(cases)("$template writes a chat of $name as transformers does", ({ template, name, want }) => {
  const chat = golden.cases[name];
  if (!chat) return expect.fail(name);
  const render = (): string => goldenTemplate(template).render(chat);
  if (want.error === undefined) expect(render()).toBe(want.text);
  else expect(render).toThrow(new FormatError(`the chat template must take these messages, got ${want.error}`));
});

test.skipIf(!hasShared)("a real template writes every chat as transformers does, in as many tokens", async () => {
  const directory = diskDirectory(shared("tokenizers/qwen2.5"));
  const [template, tokenizer] = [await loadChatTemplate(directory), await loadTokenizer(directory)];
  const got = Object.entries(golden.cases).map(([name, chat]) => {
    const text = template?.render(chat) ?? "";
    const sha256 = createHash("sha256").update(text).digest("hex");
    return [name, { sha256, ids: tokenizer.encode(text, { addSpecialTokens: false }).length }];
  });
  expect(Object.fromEntries(got)).toEqual(golden.real);
});

describe("the template of a directory", () => {
  const load = (config: unknown, more: Record<string, string> = {}, source?: { name: string; text: string }) =>
    loadChatTemplate(memoryDirectory("m", { "tokenizer_config.json": JSON.stringify(config), ...more }), source);
  const chat = { messages: [{ role: "user", content: "a" }] };

  test("is none where there is none", async () => {
    expect(await load({})).toBeUndefined();
  });

  test("is that of tokenizer_config.json, with its special tokens and those of special_tokens_map.json", async () => {
    const config = {
      chat_template: "{{ bos_token ~ eos_token }}{{ unk_token }}",
      bos_token: { content: "<s>" },
    };
    const template = await load(config, { "special_tokens_map.json": '{"bos_token":"<b>","eos_token":"<e>"}' });
    expect(template?.render(chat)).toBe("<s><e>");
  });

  test("is that of chat_template.jinja before it, and the given one before that", async () => {
    const files = { "chat_template.jinja": "file" };
    expect((await load({ chat_template: "config" }, files))?.render(chat)).toBe("file");
    expect((await load({}, files, { name: "given.jinja", text: "given" }))?.render(chat)).toBe("given");
  });

  test("may be one of several by name, another for tools", async () => {
    const named = [
      { name: "tool_use", template: "tools" },
      { name: "default", template: "default" },
    ];
    const template = await load({ chat_template: named });
    expect(template?.render(chat)).toBe("default");
    expect(template?.render({ ...chat, tools: [{}] })).toBe("tools");
  });

  test.each([
    [
      [{ name: "default" }],
      'm/tokenizer_config.json: chat_template must be a list of {"name","template"}, got {"name":"default"}',
    ],
    [[], "m/tokenizer_config.json: chat_template must be a text or a list of named ones, got neither"],
    [5, "m/tokenizer_config.json: chat_template must be a text or a list of named ones, got neither"],
  ])("is refused where it is %j", async (chat_template, message) => {
    await expect(load({ chat_template })).rejects.toThrow(new FormatError(message));
  });

  test("is refused where it is no Jinja", async () => {
    await expect(load({ chat_template: "{% for %}" })).rejects.toThrow(
      /^m\/tokenizer_config\.json: chat_template must be Jinja, got .+$/,
    );
  });
});

test.each([
  [
    "loops without end",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "more than 2 seconds",
  ],
  ["counts too far", "{{ range(100001) | length }}", "a list of more than 100000 items"],
  [
    "doubles a text",
    "{% set n = namespace(t='ab') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "a text of more than 8388608 characters",
  ],
  [
    "doubles a list",
    "{% set n = namespace(t=[1]) %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "a list of more than 100000 items",
  ],
  ["refuses", "{{ raise_exception('not so') }}", "not so"],
])("a template that %s ends with an error", (_, text, reason) => {
  expect(() => chatTemplate(text, "t").render({ messages: [] })).toThrow(
    new FormatError(`the chat template must take these messages, got ${reason}`),
  );
});

test("a template that calls itself without end ends with an error", () => {
  const template = chatTemplate("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "t");
  expect(() => template.render({ messages: [] })).toThrow(/^the chat template must take these messages, got .+$/);
});

test("ChatML is there for models without a template", () => {
  const messages = [
    { role: "user", content: "a" },
    { role: "assistant", content: "b" },
  ];
  expect(chatTemplate(CHATML, "chatml").render({ messages, addGenerationPrompt: true })).toBe(
    "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n",
  );
});

test("dates are written in English, as C does", () => {
  const date = new Date(2024, 6, 5, 15, 4, 9);
  expect(strftime(date, "%Y-%m-%d %d %b %Y %B %A %a %e %H:%M:%S %I %p %y %% %Q")).toBe(
    "2024-07-05 05 Jul 2024 July Friday Fri  5 15:04:09 03 PM 24 % %Q",
  );
});
