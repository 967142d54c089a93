import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";
import { describe, expect, test } from "vitest";
import { dataFiles } from "../../scripts/demo/data.ts";
import { baseStories, letters, notices, pirateTales, pronounOf, type Row } from "../../scripts/demo/language.ts";
import { byteAlphabet, tokenizerFiles, trainBpe } from "../../scripts/demo/tokenizer.ts";

const COUNT = 400;
const joined = (rows: readonly Row[]): string[] => rows.map(({ prompt, completion }) => prompt + completion);
const languages: readonly (readonly [name: string, tell: typeof baseStories])[] = [
  ["baseStories", baseStories],
  ["pirateTales", (...args) => joined(pirateTales(...args))],
  ["letters", (...args) => joined(letters(...args))],
  ["notices", (...args) => joined(notices(...args))],
];
const committed = (path: string): string => readFileSync(new URL(`../../demo/${path}`, import.meta.url), "utf8");
const words = (text: string): string[] => text.match(/[A-Za-z]+/g) ?? [];

/** The name and the kind of the hero, from the opening. */
function heroOf(text: string): string {
  const named = /(\w+) named (\w+)/.exec(text);
  const sat = /morning, (\w+) the (\w+) sat/.exec(text);
  return named ? `${named[2]} the ${named[1]}` : `${sat?.[1]} the ${sat?.[2]}`;
}

describe.each(languages)("%s", (_, tell) => {
  const texts = tell(5, COUNT);

  test("tells the same for the same seed, and a longer run begins with a shorter one", () => {
    expect(tell(5, COUNT)).toEqual(texts);
    expect(tell(5, 10)).toEqual(texts.slice(0, 10));
  });

  test("tells something else for another seed", () => {
    const other = new Set(tell(6, COUNT));
    expect(texts.filter((text) => other.has(text)).length).toBeLessThan(COUNT / 20);
  });

  test("fills every template and uses only printable ASCII and newlines", () => {
    for (const text of texts) expect(text).toMatch(/^[A-Z][A-Za-z ,.!?"\n]+[.!?"]$/);
    for (const text of texts) expect(text).not.toMatch(/ {2}|undefined|\?\?/);
  });

  test("uses one pronoun for the hero, the one of the name", () => {
    for (const text of texts) {
      const name = heroOf(text).split(" ")[0] ?? "";
      const other = pronounOf(name) === "she" ? ["he", "him", "his"] : ["she", "her", "hers"];
      expect(pronounOf(name), text).toBeDefined();
      expect(
        words(text.toLowerCase()).filter((word) => other.includes(word)),
        text,
      ).toEqual([]);
      expect(words(text).filter((word) => pronounOf(word) && word !== name)).toEqual([]);
    }
  });

  test("says an before a vowel and a before a consonant", () => {
    for (const text of texts) expect(text).not.toMatch(/\ban? named\b|\b[Aa] [aeiou]|\b[Aa]n [^aeiou]/);
  });

  test("keeps the names and kinds of valid out of train", () => {
    const train = new Set(tell(5, 4000).map(heroOf));
    const valid = new Set(tell(5, 4000, "valid").map(heroOf));
    expect(train.size).toBe(280);
    expect(valid.size).toBe(40);
    expect([...valid].filter((hero) => train.has(hero))).toEqual([]);
  });
});

describe("baseStories", () => {
  const stories = baseStories(7, 2000);

  test("has three to ten sentences, and rarely the same story twice", () => {
    for (const story of stories) {
      const sentences = story.match(/[.!?]"?(?=\s|$)/g)?.length ?? 0;
      expect(sentences, story).toBeGreaterThanOrEqual(3);
      expect(sentences, story).toBeLessThanOrEqual(10);
    }
    expect(new Set(stories).size).toBeGreaterThan(1990);
  });

  test("has more than 200 different words", () => {
    expect(new Set(stories.flatMap((story) => words(story.toLowerCase()))).size).toBeGreaterThan(300);
  });

  test("agrees in number with the thing", () => {
    for (const story of stories) {
      for (const [, noun] of story.matchAll(/\b(\w+) (?:was|is) ready/g)) expect(noun, story).not.toMatch(/s$/);
      for (const [, noun] of story.matchAll(/\b(\w+) (?:were|are) ready/g)) expect(noun, story).toMatch(/s$/);
      for (const [, verb, noun] of story.matchAll(/Where (is|are) my (\w+)\?/g)) {
        expect(verb, story).toBe(noun?.endsWith("s") ? "are" : "is");
        expect(story).toContain(noun?.endsWith("s") ? "there they were" : "there it was");
      }
    }
  });
});

describe("the new domains", () => {
  test("begin as the story of the same seed does", () => {
    const stories = baseStories(8, COUNT);
    for (const rows of [pirateTales(8, COUNT), letters(8, COUNT)]) {
      rows.forEach(({ prompt }, i) => {
        expect(stories[i]?.startsWith(prompt)).toBe(true);
      });
    }
  });

  test("put white space between prompt and completion, so tokens do not cross", () => {
    for (const { prompt, completion } of [...pirateTales(8, COUNT), ...letters(8, COUNT)]) {
      expect(prompt).toMatch(/\S$/);
      expect(completion).toMatch(/^\s\S/);
    }
  });

  test("sign each letter with the name in the opening, and agree with the thing in it", () => {
    for (const { prompt, completion } of letters(9, COUNT)) {
      const [, greeting, body, close] = completion.split("\n");
      expect(greeting).toMatch(/^Dear [a-z]+,$/);
      expect(body).toMatch(/^I (?:have|found) (?:an? \w+ \w*[^s]|some \w+ \w+s) /);
      expect(body).not.toMatch(/^I \w+ some .*It is|^I \w+ an? .*They are/);
      expect(close).toMatch(new RegExp(`^Your \\w+ friend, ${heroOf(prompt).split(" ")[0]}\\.$`));
    }
  });

  test("keep one thing through a pirate tale", () => {
    for (const { completion } of pirateTales(9, COUNT)) {
      const thing = /(?:sailed the seas for|hid) (?:an?|some) \w+ (\w+)/.exec(completion)?.[1];
      expect(completion).toMatch(new RegExp(`me (?:the )?${thing}, .*[Tt]he ${thing} be`));
    }
  });
});

describe("the committed files", () => {
  test.each(Object.entries(dataFiles()))("demo/data/%s is what its script writes", (name, text) => {
    expect(committed(`data/${name}`)).toBe(text);
    expect(text.length).toBeLessThanOrEqual(60_000);
  });

  test.each(Object.entries(tokenizerFiles()))("demo/base/%s is what its script writes", (name, text) => {
    expect(committed(`base/${name}`)).toBe(text);
  });
});

describe("the tokenizer", () => {
  const files = tokenizerFiles();
  const model = JSON.parse(files["tokenizer.json"] ?? "");
  const tokenizer = new Tokenizer(model, JSON.parse(files["tokenizer_config.json"] ?? ""));

  test("merges the most frequent pair first, the first in code-unit order among equals", () => {
    expect(trainBpe(["ab ab abc"], 3)).toEqual([
      ["a", "b"],
      ["Ġ", "ab"],
      ["Ġab", "c"],
    ]);
    expect(trainBpe(["xy", "ab"], 9)).toEqual([
      ["a", "b"],
      ["x", "y"],
    ]);
  });

  test("names the bytes as GPT-2 does", () => {
    const alphabet = byteAlphabet();
    expect(new Set(alphabet).size).toBe(256);
    expect([0, 10, 32, 65, 127, 160, 173, 255].map((byte) => alphabet[byte])).toEqual([..."ĀĊĠAġłŃÿ"]);
  });

  test("has 512 tokens with ids in order, <s> first", () => {
    const ids = Object.values<number>(model.model.vocab);
    expect(ids.sort((a, b) => a - b)).toEqual(Array.from({ length: 512 }, (_, id) => id));
    expect(tokenizer.encode("", {}).ids).toEqual([0]);
  });

  const seen = new Set(baseStories(1, 1000).flatMap((story) => tokenizer.encode(story).ids));
  test.each(languages)("gives back the text of %s and needs no token that stories do not use", (_, tell) => {
    for (const text of tell(10, 100, "valid")) {
      const { ids } = tokenizer.encode(text);
      expect(ids[0]).toBe(0);
      expect(ids.filter((id: number) => !seen.has(id))).toEqual([]);
      expect(tokenizer.decode(ids, { skip_special_tokens: true })).toBe(text);
    }
  });

  test("gives back any UTF-8", () => {
    const text = " Grüße, 世界! 🦊\t\n\n  it's 2 tabs\t\tend ";
    const { ids } = tokenizer.encode(text, { add_special_tokens: false });
    expect(tokenizer.decode(ids, { skip_special_tokens: true })).toBe(text);
  });
});
