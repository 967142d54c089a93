import { beforeAll, describe, expect, test } from "vitest";
import { type ChatTemplate, chatTemplate, loadChatTemplate } from "../../src/io/chat-template.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import type { JsonObject } from "../../src/io/json.ts";
import { loadTokenizer, type Tokenizer } from "../../src/io/tokenizer.ts";
import { IGNORED, type Row, RowMaker, type RowOptions } from "../../src/train/data.ts";
import { type GoldenCase, golden, goldenTemplate, goldenTokenizer, TEMPLATES } from "../golden/chat/files.ts";
import { hasShared, shared } from "../shared.ts";

let tokenizer: Tokenizer;
beforeAll(async () => {
  tokenizer = await goldenTokenizer();
});

const limits = { maxLength: 2048, contextLength: 2048, vocabSize: 519 };

function make(value: JsonObject, chatTemplateUsed: ChatTemplate | undefined, more: Partial<RowOptions> = {}) {
  const maker = new RowMaker(tokenizer, { ...limits, chatTemplate: chatTemplateUsed, ...more });
  const row = maker.row({ value, where: "train.jsonl:7" });
  return { row, stats: maker.stats };
}

/** What is learned, a text for each stretch. */
function learned(row: Row | undefined, by: Tokenizer = tokenizer): string[] {
  const texts: number[][] = [];
  row?.labels.forEach((label, t) => {
    if (label === IGNORED) return;
    if (t === 0 || row.labels[t - 1] === IGNORED) texts.push([]);
    texts.at(-1)?.push(label);
  });
  return texts.map((ids) => by.decode(ids, { skipSpecialTokens: false }));
}

const masks = TEMPLATES.flatMap((template) =>
  Object.entries(golden[template])
    .filter(([name, { mask }]) => mask && !golden.cases[name]?.addGenerationPrompt)
    .map(([name, want]) => ({ template, name, want, given: golden.cases[name] as GoldenCase })),
);

test.each(masks)(
  "of $name by $template the tokens are learned that transformers says the assistant wrote",
  ({ template, want, given }) => {
    const { row, stats } = make({ ...given }, goldenTemplate(template));
    const { ids = [], mask = [] } = want;
    expect(row?.inputIds).toEqual(ids);
    expect(row?.labels).toEqual(ids.map((id, t) => (mask[t] ? id : IGNORED)));
    expect(stats.unclearBoundaries).toBe(0);
  },
);

test.each(masks)("of $name by $template, cut, what is left is learned as before", ({ template, want, given }) => {
  const { ids = [], mask = [] } = want;
  const maxLength = ids.length - 3;
  const { row, stats } = make({ ...given }, goldenTemplate(template), { maxLength });
  expect(row?.labels).toEqual(ids.slice(0, maxLength).map((id, t) => (mask[t] ? id : IGNORED)));
  expect(stats).toMatchObject({ truncated: 1, tokens: maxLength });
});

test("a chat cut before its first answer leaves nothing to learn", () => {
  const tools = golden.cases.tools as GoldenCase;
  expect(make({ ...tools }, goldenTemplate("chatml"), { maxLength: 64 })).toMatchObject({
    row: undefined,
    stats: { truncated: 1, dropped: 1, rows: 0 },
  });
});

const chat = { messages: (golden.cases["several turns"] as GoldenCase).messages };

test.each([
  ["assistant", ["Two.<|im_end|>", "Four, don't you think?<|im_end|>", "Six 🙂 naïve.<|im_end|>"]],
  ["last", ["Six 🙂 naïve.<|im_end|>"]],
  ["completion", ["Six 🙂 naïve.<|im_end|>"]],
] as const)("of messages, %s learns %j", (lossOn, want) => {
  expect(learned(make(chat, goldenTemplate("chatml"), { lossOn }).row)).toEqual(want);
});

test("of messages, all learns all", () => {
  const { row } = make(chat, goldenTemplate("chatml"), { lossOn: "all" });
  expect(row?.labels).toEqual(row?.inputIds);
});

test("of a prompt of messages, the completion's turns are learned", () => {
  const record = { prompt: chat.messages.slice(0, 3), completion: chat.messages.slice(3) };
  const template = goldenTemplate("headers");
  expect(learned(make(record, template).row)).toEqual(["Four, don't you think?<|eot_id|>", "Six 🙂 naïve.<|eot_id|>"]);
  expect(learned(make(record, template, { lossOn: "assistant" }).row)).toHaveLength(3);
});

describe("a template that breaks the rule of prefixes", () => {
  // As templates of thinking models do, it writes the last answer in another way than those before it.
  const thinking = chatTemplate(
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}{% if m.role == 'assistant' and loop.last %}{{ '(thought) ' }}{% endif %}{{ m.content ~ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "thinking",
  );

  test("only behind a turn is no harm: its end is where its content ends", () => {
    const { row, stats } = make(chat, thinking);
    expect(learned(row)).toEqual([
      "Two.<|im_end|>",
      "Four, don't you think?<|im_end|>",
      "(thought) Six 🙂 naïve.<|im_end|>",
    ]);
    expect(stats.unclearBoundaries).toBe(0);
  });

  test("before a turn is counted: learning starts where the two part", () => {
    const odd = chatTemplate(
      "{% for m in messages %}{{ m.role ~ '\\n' ~ m.content ~ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
      "odd",
    );
    const { row, stats } = make(chat, odd, { lossOn: "last" });
    expect(learned(row)).toEqual(["\nSix 🙂 naïve.</s>"]);
    expect(stats).toMatchObject({ unclearBoundaries: 1, firstUnclear: "train.jsonl:7" });
  });
});

test.skipIf(!hasShared)(
  "of a real thinking model's template every answer is learned, and nothing of the user's",
  async () => {
    const directory = diskDirectory(shared("tokenizers/qwen2.5"));
    const qwen = await loadTokenizer(directory);
    const maker = new RowMaker(qwen, {
      ...limits,
      vocabSize: qwen.vocabSize,
      chatTemplate: await loadChatTemplate(directory),
    });
    const of = (name: string): string[] =>
      learned(maker.row({ value: { ...(golden.cases[name] as GoldenCase) }, where: name }), qwen);
    expect(of("several turns")).toEqual([
      "Two.<|im_end|>",
      "Four, don't you think?<|im_end|>",
      "<think>\n\n</think>\n\nSix 🙂 naïve.<|im_end|>",
    ]);
    const [call, ...answers] = of("tools");
    expect(call).toMatch(/"arguments": \{"place": "Kraków", "hours": 3, "exact": true, "note": null\}.*<\|im_end\|>$/s);
    expect(answers).toEqual(["No.<|im_end|>", "<think>\n\n</think>\n\nAny time.<|im_end|>"]);
    expect(maker.stats.unclearBoundaries).toBe(0);
  },
);

test("an assistant that speaks first is learned from its first word", () => {
  const messages = [
    { role: "assistant", content: "Hello." },
    { role: "user", content: "Hi." },
  ];
  expect(learned(make({ messages }, goldenTemplate("chatml")).row)).toEqual(["Hello.<|im_end|>"]);
});

test.each<[string, JsonObject, string]>([
  [
    "text parts",
    {
      messages: [
        {
          role: "user",
          content: [
            { type: "text", text: "a" },
            { type: "text", text: "b" },
          ],
        },
        { role: "assistant", content: "c" },
      ],
    },
    "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n",
  ],
  [
    "arguments as OpenAI writes them",
    {
      messages: [
        { role: "user", content: "a" },
        {
          role: "assistant",
          content: null,
          tool_calls: [{ id: "1", type: "function", function: { name: "f", arguments: '{"x":1}' } }],
        },
      ],
    },
    '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\n<call>f {"x": 1}</call><|im_end|>\n',
  ],
  [
    "ShareGPT's turns",
    {
      system: "s",
      conversations: [
        { from: "human", value: "a" },
        { from: "function_call", value: '{"name":"f","arguments":{}}' },
        { from: "observation", value: "o" },
        { from: "gpt", value: "b" },
      ],
    },
    "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\n<call>f {}</call><|im_end|>\n<|im_start|>tool\no<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
  ],
  [
    "Alpaca's rows",
    { system: "s", history: [["h", "i"]], instruction: "a", input: "b", output: "c" },
    "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nh<|im_end|>\n<|im_start|>assistant\ni<|im_end|>\n<|im_start|>user\na\n\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n",
  ],
])("%s become messages", (_, record, want) => {
  const { row } = make(record, goldenTemplate("chatml"));
  expect(tokenizer.decode(row?.inputIds ?? [], { skipSpecialTokens: false })).toBe(want);
});

test("a refusal of the template names the line", () => {
  const record = { messages: (golden.cases["roles out of turn"] as GoldenCase).messages };
  expect(() => make(record, goldenTemplate("instructions"))).toThrow(
    new FormatError("train.jsonl:7: the chat template must take these messages, got After user must not come user"),
  );
});

test("messages without a template are refused", () => {
  expect(() => make(chat, undefined)).toThrow(
    new FormatError(
      "train.jsonl:7: messages need a chat template, got a model without one. Give one, such as --chat-template chatml",
    ),
  );
});
