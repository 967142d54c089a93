// Renders chats by our own templates' code, for check_chat.py: JSON lines {template, variables, chat} in, {text} or {error} out.
import { createInterface } from "node:readline";
import { type Chat, chatTemplate } from "../../src/io/chat-template.ts";

interface Asked {
  readonly template: string;
  readonly variables: Readonly<Record<string, unknown>>;
  readonly chat: Chat;
}

for await (const line of createInterface({ input: process.stdin })) {
  const { template, variables, chat } = JSON.parse(line) as Asked;
  let answer: { readonly text: string } | { readonly error: string };
  try {
    answer = { text: chatTemplate(template, "template", variables).render(chat) };
  } catch (error) {
    answer = { error: String(error) };
  }
  console.log(JSON.stringify(answer));
}
