/** HTML as text in which nothing that is put in can be taken for markup. */
export class Html {
  readonly text: string;
  constructor(text: string) {
    this.text = text;
  }
}

type Value = string | number | Html | readonly Html[];

/** Escapes what is put in, unless it is `Html` itself. */
export function html(strings: TemplateStringsArray, ...values: readonly Value[]): Html {
  const put = (value: Value): string =>
    value instanceof Html ? value.text : typeof value === "object" ? value.map(put).join("") : escaped(`${value}`);
  return new Html(strings.map((text, i) => (i === 0 ? "" : put(values[i - 1] ?? "")) + text).join(""));
}

const ENTITIES: Readonly<Record<string, string>> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "'": "&#39;",
};

function escaped(text: string): string {
  return text.replace(/[&<>"']/g, (c) => ENTITIES[c] ?? c);
}
