/** What special tokens are for, told by what a tokenizer and a template do with them. */
import type { ChatTemplate } from "./chat-template.ts";
import { FormatError } from "./errors.ts";
import type { Tokenizer } from "./tokenizer.ts";

/** Whether an id has a text only where special tokens are shown. */
export const isSpecial = (id: number | undefined, tokenizer: Tokenizer): boolean =>
  id !== undefined && tokenizer.decode([id]) === "" && tokenizer.decode([id], { skipSpecialTokens: false }) !== "";

/**
 * The special tokens that end an answer as the template writes it: at most one. It may be another than the model's own end of text, as where a base
 * model learned from chats.
 */
export function endOfAnswer(template: ChatTemplate, tokenizer: Tokenizer): readonly number[] {
  const written = (content: string): readonly number[] => {
    const messages = [
      { role: "user", content: "x" },
      { role: "assistant", content },
    ];
    return tokenizer.encode(template.render({ messages }), { addSpecialTokens: false });
  };
  try {
    const [one, other] = [written("x"), written("y")];
    let same = 0;
    while (same < Math.min(one.length, other.length) && one.at(-1 - same) === other.at(-1 - same)) same++;
    const text = (id: number): string => tokenizer.decode([id], { skipSpecialTokens: false });
    const first = one.slice(one.length - same).find((id) => text(id).trim() !== "");
    return first !== undefined && isSpecial(first, tokenizer) ? [first] : [];
  } catch (error) {
    if (error instanceof FormatError) return []; // it does not take these messages
    throw error;
  }
}
