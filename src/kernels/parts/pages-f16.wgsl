// Pages in IEEE binary16, two to a word, the first in the low half

alias Page = vec2u;

fn lift(page: Page) -> vec4f { return vec4f(unpack2x16float(page.x), unpack2x16float(page.y)); }
